"""FLIP secondary structure: 11,156 protein chains, a state for every residue.

Dallago et al. 2021, "FLIP: Benchmark tasks in fitness landscape inference for
proteins"; labels of NetSurfP-2.0, tested on NEW364. AFL-3.0. Three FASTA files joined
into one table, hence no download.
"""

from collections.abc import Mapping

from triform.data.sources.local_builder import TEXT, LocalBuilder, Paths

NAME = "ss3.tsv.xz"
HEADER = ("id", "split", "sequence", "ss3", "mask")
SPLITS = {"train": "train", "valid": "validation", "test": "test"}


class FlipSs3(LocalBuilder, skip_registration=True):
    """Of each residue its letter, H, E or C, and 1 if that state is known, else 0."""

    name = "flip_ss3"
    folder = "flip_ss3"
    origin = "https://github.com/J-SNACKKB/FLIP (splits/secondary_structure)"
    features: Mapping = {"sequence": TEXT, "ss3": TEXT, "mask": TEXT}
    files: Mapping[str, str] = {
        NAME: "233eedcb18e3901f72103d258701c52927a3a80794b85e691575465d168ca4e7"
    }

    def examples(self, paths: Paths) -> Mapping[str, list[dict]]:
        """Chains in file order: 9,712, 1,080 and 364."""
        lines = self.read_text(NAME, paths[NAME]).removesuffix("\n").split("\n")
        chains: dict[str, list[dict]] = {split: [] for split in SPLITS.values()}
        with self.reading(NAME, f"a table of {', '.join(HEADER)}"):
            for number, line in enumerate(lines[1:], 2):
                row = dict(zip(HEADER, line.split("\t"), strict=True))
                chain = {key: row[key] for key in self.features}
                if len(set(map(len, chain.values()))) > 1:
                    reason = "sequence, ss3 and mask differ in length"
                    raise self.wrong(NAME, f"line {number}: {reason}")
                if set(row["ss3"]) - set("HEC") or set(row["mask"]) - set("01"):
                    reason = "ss3 must be of H, E and C, mask of 0 and 1"
                    raise self.wrong(NAME, f"line {number}: {reason}")
                chains[SPLITS[row["split"]]].append(chain)
        return chains
