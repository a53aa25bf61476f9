"""A web page to try a model: requests and their checks, the worker that serves them, and the page itself."""
