"""From weights and pixels to embeddings and heads: the only wing (with mini) that imports torch."""
