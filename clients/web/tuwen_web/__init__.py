"""The search page of a Tuwen server: a Chinese phrase or a picture in, the pictures that match out.

tuwen web --images samples/emoji_cn/valid_imgs.tsv
"""
