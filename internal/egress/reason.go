package egress

import (
	"fmt"
	"strings"
)

// A Reason says why the gateway refused or closed a tunnel. The set is closed:
// a Reason is a metric label and an audit field and never holds user data.
type Reason string

// The reasons of refusals before a tunnel is open.
const (
	ReasonName      Reason = "name"         // the authority is not a host and port we accept
	ReasonLiteral   Reason = "ip_literal"   // an address was asked for and no destination lists it
	ReasonNoPolicy  Reason = "no_policy"    // no snapshot is loaded
	ReasonIdentity  Reason = "identity"     // the caller's SVID no longer holds
	ReasonTunnelCap Reason = "tunnel_limit" // too many tunnels, of this caller or in all
	ReasonProbeCap  Reason = "probe_limit"  // too many hosts are looked at, for this caller or in all
	ReasonBudget    Reason = "budget"       // what this caller may use of the destination is used up
	ReasonConnCap   Reason = "conn_limit"   // too many connections of this caller
	ReasonAddress   Reason = "address"      // an address that is never dialled: zone, multicast, unspecified
	ReasonSpecial   Reason = "special"      // a special-purpose address
	ReasonPrivate   Reason = "private"      // a private address that the destination does not list
	ReasonMetadata  Reason = "metadata"     // a cloud metadata address
	ReasonLocal     Reason = "local"        // an address of this host
	ReasonForbidden Reason = "forbidden"    // an address the operator forbids, as the control plane
	ReasonResolve   Reason = "resolve"      // the name has no address, or the resolver failed
	ReasonDial      Reason = "dial"         // no address answered
	ReasonTimeout   Reason = "timeout"      // no address answered in time
	ReasonBreaker   Reason = "breaker"      // the host keeps failing, and is left alone for a while
	ReasonGrant     Reason = "grant"        // the proof of the decision is missing
	ReasonAudit     Reason = "audit"        // the record could not be written
	ReasonMethod    Reason = "method"       // not CONNECT
	ReasonRequest   Reason = "request"      // not a request we accept
	// A request inside a tunnel names another host than the tunnel leads to.
	ReasonMisdirected Reason = "misdirected"
	ReasonCertificate Reason = "certificate" // the host did not prove its name
	ReasonSecret      Reason = "secret"      // the credential to inject cannot be had
	ReasonPolicy      Reason = "policy"      // no rule allows it, or one denies it
)

// The reasons of refusals at the first bytes of an open tunnel.
const (
	ReasonNotTLS    Reason = "not_tls"      // the first bytes are not a TLS ClientHello
	ReasonHello     Reason = "hello"        // the ClientHello is malformed or too large
	ReasonNoSNI     Reason = "sni_missing"  // the ClientHello names no server
	ReasonSNI       Reason = "sni_mismatch" // the ClientHello names another server, or no valid name
	ReasonECH       Reason = "ech"          // the ClientHello carries ECH or ESNI
	ReasonALPN      Reason = "alpn"         // the ClientHello offers a protocol that is not allowed
	ReasonInspect   Reason = "inspect"      // the caller does not take the gateway for the host
	ReasonHelloTime Reason = "hello_time"   // the ClientHello did not come in time
)

// The reasons an open tunnel ends.
const (
	ReasonDone    Reason = "done"    // both sides ended
	ReasonReset   Reason = "reset"   // one side broke off
	ReasonIdle    Reason = "idle"    // no byte for the idle limit
	ReasonLife    Reason = "life"    // older than the life limit
	ReasonRevoked Reason = "revoked" // the policy in force no longer allows it

	ReasonSVIDRevoked Reason = "svid_revoked" // the caller's SVID was revoked
	ReasonSVIDEnded   Reason = "svid_expired" // the caller's SVID has ended

	ReasonShutdown Reason = "shutdown" // the gateway stops
	ReasonInternal Reason = "internal" // the gateway failed; the cause is in its log
)

// A Refusal is an error with a Reason. Text may hold what the caller sent,
// cut and quoted; it goes to the audit record and never into a label.
type Refusal struct {
	Reason Reason
	Text   string
}

func (r *Refusal) Error() string { return r.Text }

func refuse(reason Reason, format string, args ...any) *Refusal {
	return &Refusal{Reason: reason, Text: fmt.Sprintf(format, args...)}
}

// clip quotes s for an error text, at most 64 bytes of it, without what may be
// secret in a target: userinfo and query.
func clip(s string) string {
	if i := strings.IndexAny(s, "?#"); i >= 0 {
		s = s[:i] + "?..."
	}
	if i := strings.LastIndexByte(s, '@'); i >= 0 {
		s = "..." + s[i:]
	}
	if len(s) > 64 {
		return fmt.Sprintf("%q...", s[:64])
	}
	return fmt.Sprintf("%q", s)
}
