// Package audit keeps the record of what was decided and done: JSON lines in
// one file, each holding the hash of the line before it.
//
// A record is in the file, in the kernel's hands, before Append returns; Run
// brings it to the disk in groups. The package decides nothing and sends
// nothing away: Tail gives the lines to whoever uploads them. It starts no
// goroutine; the caller runs Run. Log.syncing is taken before Log.mu.
package audit

import (
	"errors"
	"time"
)

// A Kind says what a record speaks of.
type Kind string

// The kinds of record.
const (
	// KindDecision is a call that was judged.
	KindDecision Kind = "decision"
	// KindEgressOpen and KindEgressClose are the ends of a tunnel out of the
	// mesh; the second has the bytes and the duration.
	KindEgressOpen  Kind = "egress_open"
	KindEgressClose Kind = "egress_close"
	// KindTLS is a handshake that failed or a peer that was refused in it.
	KindTLS Kind = "tls"
	// KindAttest is evidence that was accepted or refused.
	KindAttest Kind = "attest"
	// KindIssue is a certificate or token: the intent before, the result after.
	KindIssue Kind = "issue"
	// KindPolicy is a change of the policy in force.
	KindPolicy Kind = "policy"
	// KindAdmin is something that an operator did.
	KindAdmin Kind = "admin"
	// KindGap says that records are missing here, how many and why.
	KindGap Kind = "gap"
)

// The values of Record.Decision.
const (
	Allow = "allow"
	Deny  = "deny"
)

// A Record is one line of the log. Append fills Seq, and Time and ID when they
// are empty. Empty fields are not written.
//
// Before it is hashed a record is made fit to keep: a query is cut from Path,
// what looks like a token or a credential is replaced by "[redacted]", and
// longer texts than anything real are cut and end in "…".
type Record struct {
	// Seq counts the records of this log from 1, without holes.
	Seq uint64
	// Time is written in UTC with nanoseconds.
	Time time.Time
	Kind Kind
	// ID is the decision id that the caller was told.
	ID string
	// Decision is Allow, Deny or empty.
	Decision string
	// Reason is from a closed set of the room that writes the record.
	Reason string
	// Rule is the id of the policy row that decided.
	Rule string
	// Dir is "in" or "out".
	Dir string
	// Src and Dst are SPIFFE IDs; Dst may be "host:" and a name.
	Src, Dst   string
	Port       uint16
	Verb, Path string
	// Revision is the policy revision in force.
	Revision uint64
	// Trace is the W3C trace id.
	Trace string
	// Peer is the remote address.
	Peer string
	// BytesUp and BytesDown count what went through, seen from the caller.
	BytesUp, BytesDown int64
	// Duration is written in milliseconds, to the microsecond.
	Duration time.Duration
	// Detail is one sentence for people.
	Detail string
}

var (
	// ErrBroken is returned by Verify for a log that is not what was written.
	ErrBroken = errors.New("audit log is broken")
	// ErrClosed is returned for a log that was closed.
	ErrClosed = errors.New("audit log is closed")
	// ErrLocked is returned by Open when another process writes the log.
	ErrLocked = errors.New("another process writes this audit log; stop it or choose another path")
)
