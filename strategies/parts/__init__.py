# SPDX-License-Identifier: Apache-2.0
"""Pieces that several strategies share."""
