"""Who is not meant to be answered, over real TLS: without a certificate, and with a worker's.

usage: outsider.py HOST:PORT KEY_FILE PROTO_DIR
KEY_FILE is the key file of a worker. Prints each refusal; fails if anything was granted that
should not be, or if what is everybody's is refused afterwards.
"""

import importlib
import re
import sys

import grpc
from client import generate

TOO_LARGE = b"x" * (5 << 20)


def blocks(path, tag, as_tag=None):
    text = open(path).read()
    found = re.findall(f"-----BEGIN {tag}-----.*?-----END {tag}-----\n?", text, re.S)
    assert found, f"no {tag} in {path}"
    return "".join(found).replace(tag, as_tag or tag).encode()


def refused(name, codes, call):
    try:
        call()
    except grpc.RpcError as error:
        assert error.code() in codes, (name, error.code(), error.details())
        assert error.details(), f"{name}: a refusal says why"
        print(f"{name}: {error.code().name}: {error.details()}")
    else:
        raise AssertionError(f"{name} was granted")


def main():
    target, key_file, proto_dir = sys.argv[1:]
    generate(proto_dir)
    pb2 = {
        name: importlib.import_module(f"swarm.v1.{name}_pb2")
        for name in ["control", "ca", "raft", "dispatcher", "objects", "types", "store"]
    }
    stubs = {
        name: importlib.import_module(f"swarm.v1.{name}_pb2_grpc")
        for name in ["control", "ca", "raft", "dispatcher"]
    }
    root = blocks(key_file, "SWARM ROOT CERTIFICATE", "CERTIFICATE")
    options = [
        ("grpc.ssl_target_name_override", "swarm-manager"),
        ("grpc.max_send_message_length", -1),
    ]
    anonymous = grpc.secure_channel(
        target, grpc.ssl_channel_credentials(root_certificates=root), options
    )
    worker = grpc.secure_channel(
        target,
        grpc.ssl_channel_credentials(
            root_certificates=root,
            private_key=blocks(key_file, "PRIVATE KEY"),
            certificate_chain=blocks(key_file, "CERTIFICATE"),
        ),
        options,
    )
    denied = {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED}
    too_large = {grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.RESOURCE_EXHAUSTED}
    spec = pb2["objects"].NetworkSpec(
        annotations=pb2["types"].Annotations(name="outsiders"), driver="overlay"
    )
    for who, channel in [("nobody", anonymous), ("worker", worker)]:
        control = stubs["control"].ControlStub(channel)
        raft = stubs["raft"].RaftStub(channel)
        refused(
            f"{who} lists nodes",
            denied,
            lambda: control.ListNodes(pb2["control"].ListNodesRequest(), timeout=20),
        )
        refused(
            f"{who} creates a network",
            denied,
            lambda: control.CreateNetwork(
                pb2["control"].CreateNetworkRequest(spec=spec), timeout=20
            ),
        )
        refused(
            f"{who} asks for the tokens",
            denied,
            lambda: control.GetJoinTokens(pb2["control"].GetJoinTokensRequest(), timeout=20),
        )
        refused(
            f"{who} proposes",
            denied,
            lambda: raft.Propose(pb2["raft"].ProposeRequest(), timeout=20),
        )
        refused(
            f"{who} sends too much where nothing is allowed",
            denied | too_large,
            lambda: raft.AppendEntries(pb2["raft"].RaftMessage(body=TOO_LARGE), timeout=20),
        )
    refused(
        "nobody sends a certificate request of 5 MiB",
        too_large,
        lambda: stubs["ca"]
        .CaStub(anonymous)
        .IssueCertificate(
            pb2["ca"].IssueCertificateRequest(csr_pem=TOO_LARGE, token="x"), timeout=20
        ),
    )
    huge = pb2["dispatcher"].AgentMessage()
    huge.register.description.hostname = "x" * (5 << 20)
    refused(
        "worker registers with 5 MiB",
        too_large,
        lambda: list(stubs["dispatcher"].DispatcherStub(worker).Session(iter([huge]), timeout=20)),
    )
    # What is everybody's is still there.
    answer = stubs["ca"].CaStub(anonymous).GetRootCa(pb2["ca"].GetRootCaRequest(), timeout=20)
    assert answer.cert_pem.strip() == root.strip()


if __name__ == "__main__":
    main()
