"""What a run becomes elsewhere: exports, each verified by the program it is for, the model card, and the upload."""
