# SPDX-License-Identifier: Apache-2.0
"""Runs both sides from one place, and the command line."""
