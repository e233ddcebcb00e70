"""Learning from a few labelled and many unlabelled images at once; one method a file."""
