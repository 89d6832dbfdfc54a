"""Data: fetch archives, index what they hold, label it. Nothing here decodes an image."""
