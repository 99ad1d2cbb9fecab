package mesh

import (
	"crypto/x509"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Why an X.509-SVID was revoked.
const (
	// WhyBanned and WhyEvicted: the agent that served it was banned or forgotten.
	WhyBanned  = "agent_banned"
	WhyEvicted = "agent_evicted"
	// WhyWithdrawn: its agent has no entry for its identity any more.
	WhyWithdrawn = "entry_withdrawn"
	// WhyRevoked: an operator asked for it.
	WhyRevoked = "svid_revoked"
)

// A RevokedSVID is an X.509-SVID that ended before its time. It never speaks
// of an identity for good: what is issued afterwards holds.
type RevokedSVID struct {
	// Serial is hex, as SerialText has it.
	Serial string `json:"serial"`
	// ID is whose it was. Proxies are not told: they see it in the certificate.
	ID spiffeid.ID `json:"id,omitzero"`
	At time.Time   `json:"at,omitzero"`
	// Until is when the last tunnel of the SVID would have ended by itself, and
	// this with it.
	Until time.Time `json:"until"`
	// Why is one of the constants above.
	Why string `json:"why"`
	// Revision is that of the record; greater means revoked later.
	Revision uint64 `json:"-"`
}

// Validate says what is wrong with a revocation that somebody sent or kept.
func (r RevokedSVID) Validate() error {
	if s, err := ParseSerial(r.Serial); err != nil || s != r.Serial {
		return fmt.Errorf("revocation: serial number %.64q is not lower-case hex without leading zeros", r.Serial)
	}
	if r.Until.IsZero() {
		return fmt.Errorf("revocation of %s has no end", r.Serial)
	}
	switch r.Why {
	case WhyBanned, WhyEvicted, WhyWithdrawn, WhyRevoked:
		return nil
	}
	return fmt.Errorf("revocation of %s: reason %.64q is not known", r.Serial, r.Why)
}

// RevokedSVIDs are all that an issuer knows. They are immutable.
type RevokedSVIDs struct {
	// Revision is that of the newest there ever was.
	Revision uint64
	// All are in the order of their revisions.
	All []RevokedSVID
}

// After returns those with a greater revision that are in force at now.
func (r *RevokedSVIDs) After(revision uint64, now time.Time) (out []RevokedSVID) {
	for _, x := range r.All {
		if x.Revision > revision && now.Before(x.Until) {
			out = append(out, x)
		}
	}
	return out
}

// Has reports whether the SVID of that serial number is revoked.
func (r *RevokedSVIDs) Has(serial string) bool {
	return slices.ContainsFunc(r.All, func(v RevokedSVID) bool { return v.Serial == serial })
}

// Grace is how long a tunnel may outlive the SVID by which its caller was let in.
// To end with it would break off a call in the middle although the caller has a
// new SVID by then. What this issuer has issued can be revoked all the while.
const Grace = time.Hour

// An Issued is an X.509-SVID that was given out.
type Issued struct {
	Serial string      `json:"s"`
	ID     spiffeid.ID `json:"i"`
	// Entry is empty, and Agent zero, for what an operator minted; Entry alone
	// for the SVID of an agent.
	Entry string      `json:"e,omitempty"`
	Agent spiffeid.ID `json:"a,omitzero"`
	// Until is the end of the SVID and of the grace of its tunnels.
	Until time.Time `json:"u"`
}

// IssuedOf describes a leaf.
func IssuedOf(leaf *x509.Certificate, id spiffeid.ID, entry string, agent spiffeid.ID) Issued {
	return Issued{Serial: SerialText(leaf.SerialNumber), ID: id, Entry: entry, Agent: agent, Until: leaf.NotAfter.UTC().Add(Grace)}
}

// SerialText is a serial number as revocations have it: hex, as openssl prints
// it but in lower case.
func SerialText(n *big.Int) string { return n.Text(16) }

// ParseSerial reads a serial number in hex, as openssl and browsers write it,
// and returns its SerialText.
func ParseSerial(text string) (string, error) {
	clean := strings.ReplaceAll(strings.TrimPrefix(strings.ToLower(text), "0x"), ":", "")
	n, ok := new(big.Int).SetString(clean, 16)
	if !ok || n.Sign() <= 0 || len(clean) > 40 || strings.ContainsAny(clean, "+-_") {
		return "", fmt.Errorf("%.64q is not a serial number: write its 1 to 40 hex digits", text)
	}
	return SerialText(n), nil
}

// A RevokeOrder says which of what was issued until now is to be revoked. One
// field is set.
type RevokeOrder struct {
	// Serial is one X.509-SVID, as SerialText has it.
	Serial string
	// Entry is all that was issued for an entry, which stays.
	Entry string
	// ID is all that was issued to an identity, whoever serves it.
	ID spiffeid.ID
}

// A RevokeResult says what became of an order.
type RevokeResult struct {
	// SVIDs are those that it ended.
	SVIDs []RevokedSVID `json:"svids"`
	// Revision is what a proxy has to confirm.
	Revision uint64 `json:"revision"`
}
