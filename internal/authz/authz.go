// Package authz judges calls: may this identity do this there, now.
//
// The rows of the reviewed policy mean what Casbin makes of them with our
// model; an index compiled from the same rows gives the same answer without an
// allocation, and Casbin checks it in tests and, for one decision in 65,536,
// while running. A Judge records each decision before it hands out a Grant.
// The package does no I/O and starts no goroutine: Judge.Run is the caller's.
package authz

import (
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

// A Reason says why a call was decided as it was. The set is closed: it is a
// metric label, and the reason field of audit records.
type Reason string

// The reasons. A call is allowed by ByRule, or by Observed and Warned.
const (
	// NoPolicy: no policy was received yet, or it has no row.
	NoPolicy Reason = "no_policy"
	// NoRow: no row allows the call.
	NoRow Reason = "no_row"
	// ByRule: the named row allows or denies the call.
	ByRule Reason = "rule"
	// FailedCond: a row would allow the call, but a condition does not hold.
	FailedCond Reason = "cond"
	// FailedToken: the same, and the condition speaks of the caller's token.
	FailedToken Reason = "token"
	// Internal: judging failed. The cause is in the log.
	Internal Reason = "internal"
	// Unrecorded: the decision could not be written to the audit log.
	Unrecorded Reason = "audit"
	// Observed and Warned: the call is allowed although it is denied, because
	// the file that denies it is not enforced.
	Observed Reason = "observe"
	Warned   Reason = "warn"
	// BadRequest: the call is not one that rows could speak of.
	BadRequest Reason = "bad_request"
)

// reasonMismatch marks the audit record of an index that disagrees with Casbin.
const reasonMismatch = "oracle_mismatch"

// A Call is what is judged.
type Call struct {
	Dir mesh.Direction
	// Src is the identity that the caller proved in the TLS handshake.
	Src spiffeid.ID
	// Dst is the text of a SPIFFE ID for In; "host:" and a lower-case name for
	// Out.
	Dst  string
	Port uint16
	Verb string
	// Path is the path as it will be forwarded, without query; "-" for CONNECT.
	Path string
	// SNI is the lower-case server name that the caller sends through a tunnel.
	SNI string
	// Token is nil when the caller showed none.
	Token *Token
	// Now is the moment to judge for; zero means the present.
	Now time.Time
	// Environment is compared with env.name=. A Judge sets it.
	Environment string
	// Peer and Trace go to the audit record.
	Peer, Trace string
	// Route says how the call is recorded; nil: as its destination says.
	Route *mesh.Route
}

// A Decision is the answer to a call. The zero Decision denies.
type Decision struct {
	Allow bool
	// Rule is the id of the row that decided; empty for a default denial. Of
	// several rows with the same effect it is the first.
	Rule   string
	Reason Reason
	// would is the reason of the denial that was not enforced.
	would Reason
}

// speakable reports whether rows can speak of the call. What is not in one
// clear form is refused here rather than compared.
func (c *Call) speakable() bool {
	if c.Src.IsZero() || c.Port == 0 || c.Verb == "" || !cleanPath(c.Path) {
		return false
	}
	switch c.Dir {
	case mesh.In:
		return strings.HasPrefix(c.Dst, "spiffe://") && len(c.Dst) > len("spiffe://")
	case mesh.Out:
		return strings.HasPrefix(c.Dst, "host:") && len(c.Dst) > len("host:")
	}
	return false
}

// Classes of bytes in a path.
const (
	plain = iota
	forbidden
	slash
	percent
)

// pathBytes gives the class of each byte. Beyond printing ASCII nothing stands
// in a request target (RFC 9112 section 3.2), "\" is a slash to some servers,
// and ";" begins parameters that some servers cut off.
var pathBytes = func() (t [256]uint8) {
	for c := range t {
		if c <= ' ' || c >= 0x7f || strings.ContainsRune("\\?#;\"<>^`{|}[]", rune(c)) {
			t[c] = forbidden
		}
	}
	t['/'], t['%'] = slash, percent
	return t
}()

// cleanPath reports whether a path has the one form in which it is judged: no
// empty, "." or ".." segment, and no escape that hides a character with a
// meaning or writes one that needs no escape. Two spellings of one path must
// not get two answers.
func cleanPath(p string) bool {
	if p == "-" {
		return true
	}
	if p == "" || p[0] != '/' {
		return false
	}
	for i := 0; i < len(p); i++ {
		switch pathBytes[p[i]] {
		case forbidden:
			return false
		case slash:
			if i+1 < len(p) && (p[i+1] == '/' || p[i+1] == '.' && dotSegment(p[i+1:])) {
				return false
			}
		case percent:
			if !cleanEscape(p[i:]) {
				return false
			}
			i += 2
		}
	}
	return true
}

// dotSegment reports whether p, which starts with a dot, starts with the
// segment "." or "..".
func dotSegment(p string) bool {
	if len(p) > 1 && p[1] == '.' {
		p = p[1:]
	}
	return len(p) == 1 || p[1] == '/'
}

// cleanEscape judges the escape at the start of p (RFC 3986 section 6.2.2).
func cleanEscape(p string) bool {
	if len(p) < 3 {
		return false
	}
	hi, ok1 := unhex(p[1])
	lo, ok2 := unhex(p[2])
	c := hi<<4 | lo
	switch {
	case !ok1 || !ok2, c < ' ', c == 0x7f, c == '/', c == '\\':
		return false
	case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		return false
	}
	return c != '-' && c != '.' && c != '_' && c != '~'
}

// unhex reads a capital hex digit: the normal form has no other.
func unhex(c byte) (byte, bool) {
	switch {
	case c >= '0' && c <= '9':
		return c - '0', true
	case c >= 'A' && c <= 'F':
		return c - 'A' + 10, true
	}
	return 0, false
}
