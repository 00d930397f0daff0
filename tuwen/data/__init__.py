"""Image-text data: pairs as TSV and JSONL, Chinese-CLIP's LMDB layout, and a real sample set."""
