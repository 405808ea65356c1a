"""Images with boxes: data sets of scenes, their views, and the loader that makes batches of both."""
