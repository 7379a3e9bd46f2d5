"""QONNX files for FPGA tools (FINN, hls4ml)."""
