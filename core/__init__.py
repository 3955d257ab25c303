# SPDX-License-Identifier: Apache-2.0
"""Words and mathematics that both sides share; no torch, no clock."""
