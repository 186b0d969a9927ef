"""A Google Cloud in this process: what Ray's launcher asks of it, answered as the interfaces say.

Every request and every answer is held against the documents that come with Google's client, which
describe the interfaces: a field that is not there, a value that is not among those allowed, or a
name that a rule forbids is refused, as the cloud does."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import httplib2
import pytest
from googleapiclient.discovery_cache import get_static_doc

_INTERFACES = {"compute": "v1", "iam": "v1", "cloudresourcemanager": "v1"}
_TYPES = {"string": str, "boolean": bool, "integer": int, "number": (int, float), "object": dict}
# https://cloud.google.com/compute/docs/labeling-resources
_LABEL = r"[a-z0-9_-]{0,63}"
# Machines with GPUs cannot move while they run.
_WITH_GPUS = re.compile(r"(a2|a3|a4|g2|g4)-")


class RefusedError(Exception):
    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class GoogleCloud:
    """One project with one network.

    instances: machines that are there, by name, each as it was asked for and with what the cloud
        adds
    roles: the roles of each account
    """

    def __init__(self, project: str, region: str) -> None:
        self.instances: dict[str, dict[str, Any]] = {}
        self.roles: dict[str, set[str]] = {}
        self._project, self._region = project, region
        self._accounts: dict[str, dict[str, Any]] = {}
        self._metadata: dict[str, Any] = {"fingerprint": "1"}
        self._numbers = itertools.count(1)
        self._documents = {
            name: json.loads(get_static_doc(name, version)) for name, version in _INTERFACES.items()
        }

    def request(self, uri: str, method: str, body: bytes | str | None) -> tuple[Any, bytes]:
        """What ``httplib2.Http.request`` returns."""
        try:
            status, answer = 200, self._answer(uri, method, body)
        except RefusedError as error:
            status, answer = error.status, {"error": {"code": error.status, "message": str(error)}}
        headers = {"status": str(status), "content-type": "application/json"}
        return httplib2.Response(headers), json.dumps(answer).encode()

    def _answer(self, uri: str, method: str, body: bytes | str | None) -> dict[str, Any]:
        if uri == "https://oauth2.googleapis.com/token":
            return {"access_token": "a", "expires_in": 3600, "token_type": "Bearer"}
        document, called, given = self._method(uri, method)
        if "request" in called:
            asked = json.loads(body or "{}")
            _check(document, called["request"]["$ref"], asked, called["id"])
            given["body"] = asked
        name = called["id"].replace(".", "_")
        handler: Callable[..., dict[str, Any]] | None = getattr(self, f"_{name}", None)
        if handler is None:
            raise NotImplementedError(f"nothing here answers {called['id']}")
        if given.get("project", given.get("projectId", self._project)) != self._project:
            raise RefusedError(403, f"no such project, or not yours: {given}")
        answer = handler(given)
        _check(document, called["response"]["$ref"], answer, called["id"])
        return answer

    def _method(self, uri: str, verb: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """The document, the method, and the parameters of a request."""
        parts = urlsplit(uri)
        for document in self._documents.values():
            if parts.netloc != urlsplit(document["rootUrl"]).netloc:
                continue
            for method in _methods(document):
                path = document["servicePath"] + method.get("flatPath", method["path"])
                pattern = re.sub(r"\\{\+?(\w+)\\}", r"(?P<\1>[^/:]+)", re.escape(f"/{path}"))
                found = re.fullmatch(pattern, parts.path)
                if found and method["httpMethod"] == verb:
                    query = {key: one for key, (one, *_) in parse_qs(parts.query).items()}
                    unknown = set(query) - set(method["parameters"]) - {"alt"}
                    if unknown:
                        raise RefusedError(400, f"{method['id']} knows no {unknown}")
                    named = {key: unquote(value) for key, value in found.groupdict().items()}
                    return document, method, {**query, **named}
        raise NotImplementedError(f"no interface has {verb} {uri}")

    def _operation(self, kind: str) -> dict[str, Any]:
        return {"name": f"operation-{next(self._numbers)}", "operationType": kind, "status": "DONE"}

    # The project and its accounts.

    def _cloudresourcemanager_projects_get(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"projectId": self._project, "lifecycleState": "ACTIVE"}

    def _cloudresourcemanager_projects_getIamPolicy(self, given: dict[str, Any]) -> dict[str, Any]:
        return {
            "bindings": [
                {"role": role, "members": [member]}
                for member, roles in self.roles.items()
                for role in roles
            ]
        }

    def _cloudresourcemanager_projects_setIamPolicy(self, given: dict[str, Any]) -> dict[str, Any]:
        self.roles.clear()
        for binding in given["body"]["policy"]["bindings"]:
            for member in binding["members"]:
                self.roles.setdefault(member, set()).add(binding["role"])
        return given["body"]["policy"]

    def _iam_projects_serviceAccounts_get(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given["serviceAccountsId"]
        if name not in self._accounts:
            raise RefusedError(404, f"no account {name}")
        return self._accounts[name]

    def _iam_projects_serviceAccounts_create(self, given: dict[str, Any]) -> dict[str, Any]:
        email = f"{given['body']['accountId']}@{self._project}.iam.gserviceaccount.com"
        self._accounts[email] = {"email": email, "projectId": self._project}
        return self._accounts[email]

    # Networks and keys.

    def _compute_projects_get(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"name": self._project, "commonInstanceMetadata": self._metadata}

    def _compute_projects_setCommonInstanceMetadata(self, given: dict[str, Any]) -> dict[str, Any]:
        if given["body"].get("fingerprint") != self._metadata["fingerprint"]:
            raise RefusedError(412, "somebody else changed the metadata")
        self._metadata = {**given["body"], "fingerprint": str(next(self._numbers))}
        return self._operation("setMetadata")

    def _compute_subnetworks_list(self, given: dict[str, Any]) -> dict[str, Any]:
        if given["region"] != self._region:
            raise RefusedError(404, f"no region {given['region']}")
        link = f"projects/{self._project}/regions/{self._region}/subnetworks/default"
        return {"items": [{"name": "default", "selfLink": link}]}

    def _compute_globalOperations_get(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"name": given["operation"], "status": "DONE"}

    _compute_zoneOperations_get = _compute_globalOperations_get

    # Machines.

    def _compute_instances_insert(self, given: dict[str, Any]) -> dict[str, Any]:
        asked, zone = given["body"], given["zone"]
        for label, value in asked["labels"].items():
            if not re.fullmatch(_LABEL, value) or not re.fullmatch(f"[a-z]{_LABEL}", label):
                raise RefusedError(400, f"label {label} = {value!r}")
        kind = asked["machineType"]
        if not kind.startswith(f"zones/{zone}/machineTypes/"):
            raise RefusedError(400, f"machineType {kind} of a machine in {zone}")
        stays = asked.get("scheduling", {}).get("onHostMaintenance", "MIGRATE") == "MIGRATE"
        if _WITH_GPUS.match(kind.rpartition("/")[2]) and stays:
            raise RefusedError(400, f"{kind} does not support live migration")
        for disk in asked["disks"]:
            named = disk["initializeParams"].get("diskType", f"zones/{zone}/diskTypes/pd-standard")
            if not named.startswith(f"zones/{zone}/diskTypes/"):
                raise RefusedError(400, f"diskType {named} of a machine in {zone}")
        number = next(self._numbers)
        for interface in asked["networkInterfaces"]:
            interface["networkIP"] = f"10.138.0.{number}"
            for access in interface.get("accessConfigs", []):
                access["natIP"] = f"203.0.113.{number}"
        self.instances[asked["name"]] = {**asked, "status": "RUNNING", "labelFingerprint": "1"}
        return self._operation("insert")

    def _compute_instances_list(self, given: dict[str, Any]) -> dict[str, Any]:
        kept = [one for one in self.instances.values() if _passes(given["filter"], one)]
        return {"items": kept} if kept else {}

    def _compute_instances_get(self, given: dict[str, Any]) -> dict[str, Any]:
        return self._instance(given)

    def _compute_instances_setLabels(self, given: dict[str, Any]) -> dict[str, Any]:
        machine = self._instance(given)
        if given["body"]["labelFingerprint"] != machine["labelFingerprint"]:
            raise RefusedError(412, "somebody else changed the labels")
        machine["labels"] = given["body"]["labels"]
        machine["labelFingerprint"] = str(next(self._numbers))
        return self._operation("setLabels")

    def _compute_instances_delete(self, given: dict[str, Any]) -> dict[str, Any]:
        del self.instances[self._instance(given)["name"]]
        return self._operation("delete")

    def _instance(self, given: dict[str, Any]) -> dict[str, Any]:
        if given["instance"] not in self.instances:
            raise RefusedError(404, f"no instance {given['instance']}")
        return self.instances[given["instance"]]


def log_in(monkeypatch: pytest.MonkeyPatch, cloud: GoogleCloud, folder: Path) -> None:
    """Send what this process asks of Google to ``cloud``, as a user of ``gcloud`` would be known
    there; ``folder`` keeps the credentials."""
    kept = folder / "credentials.json"
    login = {"client_id": "c", "client_secret": "nobody's", "refresh_token": "nobody's either"}
    kept.write_text(json.dumps({"type": "authorized_user", **login}))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(kept))
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "another-project")

    def request(http: Any, uri: str, method: str = "GET", body: Any = None, **_: Any) -> Any:
        return cloud.request(uri, method, body)

    monkeypatch.setattr(httplib2.Http, "request", request)


def _methods(resource: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from resource.get("methods", {}).values()
    for inner in resource.get("resources", {}).values():
        yield from _methods(inner)


def _check(document: dict[str, Any], schema: str, value: Any, where: str) -> None:
    """Refuse a value that the document's schema of this name does not allow."""
    _check_field(document, {"$ref": schema}, value, where)


def _check_field(document: dict[str, Any], rule: dict[str, Any], value: Any, where: str) -> None:
    if "$ref" in rule:
        rule = document["schemas"][rule["$ref"]]
    if rule["type"] == "array":
        if not isinstance(value, list):
            raise RefusedError(400, f"{where} is a list, not {value!r}")
        for i, one in enumerate(value):
            _check_field(document, rule["items"], one, f"{where}[{i}]")
        return
    # A number of 64 bits is a string in JSON, and a plain number is taken too.
    long = rule.get("format") in ("int64", "uint64")
    kind = (str, int) if long else _TYPES.get(rule["type"], object)
    if not isinstance(value, kind):
        raise RefusedError(400, f"{where} is of type {rule['type']}, not {value!r}")
    if rule["type"] == "object":
        for name, inner in value.items():
            field = rule.get("properties", {}).get(name, rule.get("additionalProperties"))
            if field is None:
                raise RefusedError(400, f"{where} has no field {name!r}")
            _check_field(document, field, inner, f"{where}.{name}")
    elif "enum" in rule and value not in rule["enum"]:
        raise RefusedError(400, f"{where} is one of {rule['enum']}, not {value!r}")
    elif "pattern" in rule and not re.fullmatch(rule["pattern"], str(value)):
        raise RefusedError(400, f"{where} is like {rule['pattern']}, not {value!r}")


def _passes(expression: str, machine: dict[str, Any]) -> bool:
    """Whether a machine passes a filter, of the kind that Ray writes: ``(a = b) AND (c = d OR
    c = e) AND (NOT f:*)``."""
    return all(
        any(_term(term, machine) for term in clause.strip("() ").split(" OR "))
        for clause in expression.split(" AND ")
    )


def _term(term: str, machine: dict[str, Any]) -> bool:
    absent = re.fullmatch(r"NOT ([\w.-]+):\*", term.strip("() "))
    if absent:
        return _field(machine, absent[1]) is None
    field, value = re.fullmatch(r"([\w.-]+) = ([\w-]+)", term.strip("() ")).groups()
    return _field(machine, field) == value


def _field(machine: dict[str, Any], name: str) -> str | None:
    head, _, rest = name.partition(".")
    return machine["labels"].get(rest) if head == "labels" else machine.get(head)
