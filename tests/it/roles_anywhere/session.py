# Prints the credentials that AWS's client for Python gets, or the status and the message of its
# rejection. The arguments are its own, in this order.
import sys

from iam_rolesanywhere_session import CredentialsRetrievalError, IAMRolesAnywhereSession

endpoint, ca, certificate, key, chain, role, profile, anchor, region, name = sys.argv[1:]
session = IAMRolesAnywhereSession(
    endpoint=endpoint,
    verify=ca,
    certificate=certificate,
    private_key=key,
    certificate_chain=chain or None,
    role_arn=role,
    profile_arn=profile,
    trust_anchor_arn=anchor,
    region=region,
    role_session_name=name or None,
)
try:
    print(session.get_session().get_credentials().get_frozen_credentials().access_key)
except CredentialsRetrievalError as error:
    print(error.status_code, error.message)
