"""PASCAL VOC with YOLOv3."""
