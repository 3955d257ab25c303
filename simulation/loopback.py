# SPDX-License-Identifier: Apache-2.0
"""Rehearse a deployment on this machine: a SuperLink over TLS and a SuperNode for each client."""

import datetime
import ipaddress
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tomli_w
from numpy.typing import NDArray

from ..client.files import arrays, batches, format_of
from ..client.policy import Policy
from ..client.shard import columns_needed
from ..client.site import simulation_state
from ..core.errors import ConfigError, FedsynthError
from ..core.users import canonical_user_ids, partition_of
from ..server.planned import Plan, start
from .flower import (
    Listener,
    drive,
    engine,
    until_listening,
    write_connection,
)
from .processes import Processes, free_ports

if TYPE_CHECKING:
    import pyarrow as pa

_log = logging.getLogger(__name__)
_ONLINE_S = 180.0
_LIST_EVERY_S = 1.0
_VALID = datetime.timedelta(days=30)
MAX_CLIENTS = 64  # each is two processes of 120 MB and more


@dataclass(frozen=True)
class Owner:
    """What one data owner of the rehearsal has on disk.

    Attributes:
      name: Of the client.
      folder: With the shard, the schema, the policy and the state; nobody else may look in.
      node_config: File that says where these are, for `flower-supernode --node-config`.
    """

    name: str
    folder: Path
    node_config: Path


def run_loopback(plan: Plan, *, on_event: Listener, app_dir: Path | None = None) -> Path:
    """Do a planned run on a real SuperLink with real SuperNodes, all on this machine.

    TLS and node authentication are on, every client has files of its own, and only messages
    connect it with the server: what works here works on machines that are apart.

    Args:
      plan: The run; its population is dealt out to `engine.clients` SuperNodes.
      on_event: Told of every round.
      app_dir: Flower app to run; `None`: this package's own. Tests bring one of theirs.

    Returns:
      The release folder.

    Raises:
      FedsynthError: As the run itself raised it, or what Flower said if that failed.
    """
    clients = plan.config.engine.clients
    if clients > MAX_CLIENTS:
        raise ConfigError(
            f"engine.clients = {clients} would start as many SuperNodes on this machine;"
            f" 'loopback' takes at most {MAX_CLIENTS}, 'local' and 'ray' take more"
        )
    start(plan)
    with engine(plan) as (folder, ours):
        _log.info("dealing the population out to %d clients, each with files of its own", clients)
        owners = deal(plan)
        write_certificates(folder)
        for owner in owners:
            write_node_key(folder, owner.name)
        ports = free_ports(1 + clients)
        _log.info("starting a SuperLink on port %d, with TLS and node authentication", ports[0])
        connection = _serve_superlink(ours, folder, ports[0])
        _register(ours, folder, connection, owners)  # before a SuperNode may connect
        _log.info("starting %d SuperNodes", clients)
        for owner, port in zip(owners, ports[1:], strict=True):
            _serve_supernode(ours, folder, owner, superlink=ports[0], port=port)
        _until_online(ours, connection, clients)
        return drive(
            plan,
            ours,
            folder=folder,
            connection=connection,
            app_dir=app_dir,
            on_event=on_event,
        )


def deal(plan: Plan) -> list[Owner]:
    """Give every client of a run a folder with its users' records, a policy and a state.

    The folders lie beside the ledger and stay: the state in them is what each client remembers
    having answered.
    """
    config = plan.config
    if config.data.path is None:
        raise ConfigError("data.path is missing: a rehearsal needs the population's records")
    clients = config.engine.clients
    root = simulation_state(config) / f"loopback-{clients}"
    owners = []
    for number in range(clients):
        folder = root / f"client-{number}"
        for each in (simulation_state(config), root, folder):
            each.mkdir(parents=True, exist_ok=True, mode=0o700)
        owners.append(Owner(f"client-{number}", folder, folder / "node.toml"))
    shards = _split(plan, config.path(config.data.path), [owner.folder for owner in owners])
    source = config.path(config.data.path).stat()
    for owner, shard in zip(owners, shards, strict=True):
        # as old as its source, so that what a client keeps of an unchanged shard stays good
        os.utime(shard, ns=(source.st_atime_ns, source.st_mtime_ns))
        schema, policy = owner.folder / "schema.json", owner.folder / "policy.toml"
        schema.write_text(json.dumps(plan.schema.to_json(), indent=1), encoding="utf-8")
        terms = Policy.for_simulation(config).model_dump(mode="json")
        policy.write_text(tomli_w.dumps(terms), encoding="utf-8")
        settings = {
            "client": owner.name,
            "shard": str(shard),
            "schema": str(schema),
            "policy": str(policy),
            "state": str(owner.folder / "state"),
        }
        owner.node_config.write_text(tomli_w.dumps(settings), encoding="utf-8")
    return owners


def _split(plan: Plan, path: Path, folders: Sequence[Path]) -> list[Path]:
    """Write each client's share of a data file, each user whole; the files."""
    if format_of(path) == "npz":
        return _split_arrays(plan, path, folders)
    import pyarrow as pa
    import pyarrow.parquet as pq

    shards = [folder / "shard.parquet" for folder in folders]
    names = columns_needed(plan.schema, plan.config.privacy_unit)
    first = 0
    with ExitStack() as files:
        writers: list[Any] = []
        for table in _or_empty(batches(path, names), names):
            part = _parts(plan, table.column, first, table.num_rows, len(folders))
            first += table.num_rows
            if not writers:
                for shard in shards:
                    shard.unlink(missing_ok=True)
                    writer = pq.ParquetWriter(shard, table.schema, write_page_checksum=True)
                    writers.append(files.enter_context(writer))
            for number, writer in enumerate(writers):
                writer.write_table(table.filter(pa.array(part == number)))
    return shards


def _split_arrays(plan: Plan, path: Path, folders: Sequence[Path]) -> list[Path]:
    """`_split` of a npz file."""
    image = [plan.schema.image.name] if plan.schema.image else []
    found = arrays(path, [*columns_needed(plan.schema, plan.config.privacy_unit), *image])
    length = len(next(iter(found.values())))
    part = _parts(plan, found.__getitem__, 0, length, len(folders))
    shards = [folder / "shard.npz" for folder in folders]
    for number, shard in enumerate(shards):
        mine = {name: array[part == number] for name, array in found.items()}
        np.savez(shard, allow_pickle=False, **mine)
    return shards


def _parts(
    plan: Plan, column: Any, first: int, num_records: int, num_parts: int
) -> NDArray[np.int64]:
    """Client of each record, as every engine deals them out, `(num_records,)`."""
    name = plan.config.privacy_unit.column
    if name is None:  # a record is a user, known by its position in the file
        ids = np.arange(first, first + num_records).astype(np.str_)
    else:
        ids = canonical_user_ids(column(name), where=f"user-id column {name!r}")
    return partition_of(ids, num_parts)


def _or_empty(tables: "Iterator[pa.Table]", names: Sequence[str]) -> "Iterator[pa.Table]":
    """The tables, or one without records if there is none."""
    import pyarrow as pa

    empty = True
    for table in tables:
        empty = False
        yield table
    if empty:
        yield pa.table({name: pa.array([], type=pa.large_string()) for name in names})


def write_certificates(folder: Path) -> None:
    """A certificate authority and, signed by it, a certificate for this machine's loopback.

    Writes `ca.crt`, `server.pem` and `server.key`. The authority's own key is never written.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))

    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    def certificate(subject: str, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(named(subject))
            .issuer_name(named("fedsynth rehearsal"))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + _VALID)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),
                critical=False,
            )
        )

    signs = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    root = (
        certificate("fedsynth rehearsal", authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(signs, critical=True)
        .sign(authority, hashes.SHA384())
    )
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))]
    leaf = (
        certificate("localhost", server.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(authority, hashes.SHA384())
    )
    pem = serialization.Encoding.PEM
    (folder / "ca.crt").write_bytes(root.public_bytes(pem))
    (folder / "server.pem").write_bytes(leaf.public_bytes(pem))
    _write_secret(
        folder / "server.key",
        server.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def write_node_key(folder: Path, name: str) -> None:
    """An ECDSA P-384 key pair in OpenSSH's format, as `ssh-keygen -t ecdsa -b 384` makes it."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    _write_secret(
        folder / name,
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        ),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    (folder / f"{name}.pub").write_bytes(public + b"\n")


def _write_secret(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read, from its first byte on."""
    path.touch(mode=0o600)
    path.write_bytes(content)


def _serve_superlink(ours: Processes, folder: Path, port: int) -> str:
    """Start the SuperLink; its name in our Flower configuration."""
    ours.serve(
        "superlink",
        [
            *("flower-superlink", "--host", "127.0.0.1", "--port", str(port)),
            *("--ssl-ca-certfile", str(folder / "ca.crt")),
            *("--ssl-certfile", str(folder / "server.pem")),
            *("--ssl-keyfile", str(folder / "server.key")),
            *("--enable-supernode-auth", "--database", str(folder / "superlink.db")),
            *("--isolation", "subprocess", "--disable-runtime-dependency-installation"),
        ],
    )
    until_listening(ours, port)
    return write_connection(
        folder,
        {"address": f"127.0.0.1:{port}", "root-certificates": str(folder / "ca.crt")},
    )


def _register(ours: Processes, folder: Path, connection: str, owners: Sequence[Owner]) -> None:
    """Tell the SuperLink every client's public key."""

    def register(name: str) -> None:
        key = str(folder / f"{name}.pub")
        ours.output_of(["flwr", "supernode", "register", key, connection, "--name", name])

    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(register, [owner.name for owner in owners]))


def _serve_supernode(
    ours: Processes, folder: Path, owner: Owner, *, superlink: int, port: int
) -> None:
    """Start one client's SuperNode, with a home of its own for what Flower installs there."""
    ours.serve(
        owner.name,
        [
            *("flower-supernode", "--superlink", f"127.0.0.1:{superlink}"),
            *("--root-certificates", str(folder / "ca.crt")),
            *("--auth-supernode-private-key", str(folder / owner.name)),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--node-config", str(owner.node_config)),
            *("--isolation", "subprocess"),
        ],
        env={"FLWR_HOME": str(folder / f"{owner.name}.home")},
    )


def _until_online(ours: Processes, connection: str, clients: int) -> None:
    """Wait until all SuperNodes are connected."""
    deadline = time.monotonic() + _ONLINE_S
    online = 0
    while time.monotonic() < deadline:
        ours.check()
        listed = ours.output_of(["flwr", "supernode", "list", connection, "--format", "json"])
        nodes = json.loads(listed[listed.index("{") :])["nodes"]
        before, online = online, sum(node["status"] == "online" for node in nodes)
        if online != before:
            _log.info("%d of %d SuperNodes are online", online, clients)
        if online >= clients:
            return
        time.sleep(_LIST_EVERY_S)
    raise FedsynthError(
        f"{online} of {clients} SuperNodes were online after {_ONLINE_S:g} s; see {ours.folder}"
    )
