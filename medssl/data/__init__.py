"""Volume store and image folders to batches: sampling, loading, and the batch itself."""
