def trainable(model):
    """The number of trainable parameters, which torch calls parameters."""
    return sum(v.shape.num_elements() for v in model.trainable_variables)
