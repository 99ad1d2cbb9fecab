package mesh

import (
	"crypto/sha256"
	"encoding/hex"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// An Agent is a node identity that the issuer has attested.
type Agent struct {
	ID spiffeid.ID `json:"id"`
	// AttestationType is the node attestor, such as "join_token".
	AttestationType string     `json:"attestation_type"`
	Selectors       []Selector `json:"selectors,omitempty"`
	// Serial is the serial number of the current agent SVID, decimal.
	Serial string `json:"serial"`
	// NextSerial is that of a renewed SVID which the agent has not used yet.
	// Its first use makes it the current one; until then both are good.
	NextSerial string    `json:"next_serial,omitempty"`
	ExpiresAt  time.Time `json:"expires_at"`
	Banned     bool      `json:"banned,omitempty"`
	// Revision is that of the record as it was read, 0 for a new one. An agent
	// is kept only in the place of what was read.
	Revision int64 `json:"-"`
}

// A ProxyState says whether a proxy acts on the newest policy.
type ProxyState string

// Synced has acknowledged the newest policy revision, Stale has not yet,
// Rejected has refused it and keeps its last good one.
const (
	Synced   ProxyState = "SYNCED"
	Stale    ProxyState = "STALE"
	Rejected ProxyState = "REJECTED"
)

// A Proxy is what the issuer knows of one sidecar or gateway.
type Proxy struct {
	Agent    spiffeid.ID `json:"agent"`
	Workload spiffeid.ID `json:"workload"`
	// Kind is "sidecar" or "gateway".
	Kind string `json:"kind"`
	// Version is what it was built from, empty when it does not say.
	Version     string    `json:"version,omitempty"`
	SVIDExpires time.Time `json:"svid_expires"`
	// PolicyRevision is the newest that the proxy has acknowledged.
	PolicyRevision uint64     `json:"policy_revision"`
	State          ProxyState `json:"state"`
	// Since is when it acknowledged that, at the earliest known.
	Since time.Time `json:"since,omitzero"`
	// Wanted is the revision that it should act on, Group its group while that
	// depends on it, and PolicyHash the hash of the policies it acts on, empty
	// when they are neither those in force nor those of the canary group.
	Wanted     uint64 `json:"wanted,omitempty"`
	Group      string `json:"group,omitempty"`
	PolicyHash string `json:"policy_hash,omitempty"`
	// Reason says why a revision was rejected.
	Reason string `json:"reason,omitempty"`
	// CandidateRefused says why the candidate is not tried.
	CandidateRefused string    `json:"candidate_refused,omitempty"`
	Connected        bool      `json:"connected"`
	LastSeen         time.Time `json:"last_seen"`
	// Authorities is nil when the proxy does not say what it trusts.
	Authorities *Authorities `json:"authorities,omitempty"`
	// Verified says that it has counted the signatures of its policies itself.
	Verified bool `json:"verified,omitempty"`
	// Revoked is the revision of the newest revocations that it acts on.
	Revoked uint64 `json:"revoked,omitempty"`
	// Traffic is nil when the proxy says nothing of it. It is immutable.
	Traffic *Traffic `json:"traffic,omitempty"`
	// Revision is that of the newest snapshot it has acknowledged, as the issuer
	// counts that it is connected to.
	Revision uint64 `json:"-"`
}

// Authorities are what a proxy acts on while the roots of the trust domain
// change: roots by RootID, JWT keys by their kid.
type Authorities struct {
	// Trusts are those in its bundle.
	Trusts []string `json:"trusts"`
	// Shows are the roots above the SVIDs it holds, the node's and the
	// workload's.
	Shows []string `json:"shows"`
}

// RootID names a root certificate, given in DER: hex SHA-256.
func RootID(der []byte) string {
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:])
}

// IssuerStatus is what an issuer says of itself.
type IssuerStatus struct {
	TrustDomain    spiffeid.TrustDomain `json:"trust_domain"`
	Revision       uint64               `json:"revision"`
	PolicyRevision uint64               `json:"policy_revision"`
	PolicyHash     string               `json:"policy_hash"`
	// PolicySet is the hash of the set that was pushed; empty when the policies
	// come from files.
	PolicySet string `json:"policy_set,omitempty"`
	// NextRevision is the first that no set has used, also none that was given
	// to a canary group only.
	NextRevision uint64 `json:"next_revision,omitempty"`
	// Rollout is the newest that went to a canary group first, nil before any.
	Rollout *Rollout `json:"rollout,omitempty"`
	// LastRefusal is why the newest edit of the policy files was refused;
	// empty when the newest edit is in force.
	LastRefusal string    `json:"last_refusal,omitempty"`
	Started     time.Time `json:"started"`
}
