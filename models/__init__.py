# SPDX-License-Identifier: Apache-2.0
"""Public models, one file each: what proposes and varies candidates, and what embeds records.

They see public and released values only, or, as embedders, one record at a time at its owner.
"""
