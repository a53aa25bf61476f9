"""A page to try a model: what may be asked of it, how much of that the memory allows, and the page itself."""
