# SPDX-License-Identifier: Apache-2.0
"""Asks, sums, charges and releases; never sees a record."""
