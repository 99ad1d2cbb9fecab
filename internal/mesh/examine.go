package mesh

import (
	"net/netip"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// A Handshake is what became of one that a sidecar made to see whether it can.
type Handshake struct {
	Address netip.AddrPort `json:"address"`
	// Err is why there is no connection; the rest is empty then.
	Err string `json:"error,omitempty"`
	// Peer proved itself by a certificate that ends at Expires.
	Peer     string        `json:"peer,omitempty"`
	Expires  time.Time     `json:"expires,omitzero"`
	Version  string        `json:"version,omitempty"`
	Cipher   string        `json:"cipher,omitempty"`
	Exchange string        `json:"key_exchange,omitempty"`
	Protocol string        `json:"protocol,omitempty"`
	Took     time.Duration `json:"took_ns,omitempty"`
}

// A HandshakeReport has one Handshake for each endpoint of a service.
type HandshakeReport struct {
	// From is the caller, by a certificate that ends at Expires.
	From    spiffeid.ID `json:"from"`
	Expires time.Time   `json:"expires"`
	Service ServiceName `json:"service"`
	// Identity is what every endpoint must prove.
	Identity spiffeid.ID `json:"identity"`
	// Revision is that of the policy by which the sidecar knows the service.
	Revision   uint64      `json:"policy_revision"`
	Handshakes []Handshake `json:"handshakes"`
}

// An IdentityReport says which identity a sidecar serves.
type IdentityReport struct {
	Identity spiffeid.ID `json:"identity"`
	Issued   time.Time   `json:"issued"`
	Expires  time.Time   `json:"expires"`
	Serial   string      `json:"serial"`
	Entry    string      `json:"entry"`
	// Parent is the node that the entry is for, or an alias of nodes.
	Parent spiffeid.ID `json:"parent,omitzero"`
}

// A ProcessReport says which identity a local process may have, and why.
type ProcessReport struct {
	PID    int    `json:"pid"`
	UID    uint32 `json:"uid"`
	Exe    string `json:"exe"`
	Cgroup string `json:"cgroup,omitempty"`
	// Selectors are those that are true of it.
	Selectors []string `json:"selectors"`
	// Served is the identity that the sidecar serves.
	Served  spiffeid.ID   `json:"served,omitzero"`
	Entries []EntryReport `json:"entries"`
}

// An EntryReport compares an entry of this node with a process.
type EntryReport struct {
	ID       string      `json:"id"`
	SPIFFEID spiffeid.ID `json:"spiffe_id"`
	// Has and Misses are its selectors, as they are true of the process or not.
	Has    []string `json:"has"`
	Misses []string `json:"misses"`
}

// Given says whether the process has the entry's identity.
func (e EntryReport) Given() bool { return len(e.Has) > 0 && len(e.Misses) == 0 }
