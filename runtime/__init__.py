"""mxforge"""
