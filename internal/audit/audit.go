// Package audit keeps the record of what was decided and done: JSON lines in
// one file, each holding the hash of the line before it.
//
// A Log keeps records, a Ledger keeps some and counts the others. A record is in
// the file, in the kernel's hands, before Append returns, and a count in mapped
// memory; Run brings both to the disk in groups. The package decides nothing
// and sends nothing away: Tail gives the lines to whoever uploads them. What
// works beside the callers is started by Run and ends with it. A shard's lock is
// taken before Ledger.mu, Log.syncing before Log.mu.
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
	// KindError is a call that was allowed and came to nothing.
	KindError Kind = "error"
	// KindShadow is a call that a candidate policy would decide otherwise: its
	// Decision is the candidate's. Detail says how both decide.
	KindShadow Kind = "shadow"
	// KindRemoved says which records were removed, and by which rule, before they
	// are.
	KindRemoved Kind = "removed"
	// KindArchive says which segment of an archive of copied calls was closed, or
	// removed, and what its hash is.
	KindArchive Kind = "archive"
	// KindName is a name that a workload asked a nameserver for.
	KindName Kind = "name"
	// KindRollup counts the events of one kind in a stretch of time.
	KindRollup Kind = "rollup"
)

// Kinds has every kind of record.
var Kinds = []Kind{
	KindDecision, KindRollup, KindEgressOpen, KindEgressClose, KindTLS, KindAttest,
	KindIssue, KindPolicy, KindAdmin, KindGap, KindError, KindShadow, KindRemoved, KindArchive, KindName,
}

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
	// Class is how the calls ended that a roll-up counts: "1xx" to "5xx",
	// "none" when the caller was told nothing, "lost" when the process died
	// first.
	Class string
	// Count is how many events the record stands for: those that a roll-up
	// counts, or those that are missing at a gap.
	Count uint64
	// Total counts a roll-up's events since its cell was made. The id names the
	// cell.
	Total uint64
	// From is the start of the stretch of time that a roll-up counts; its end
	// is Time.
	From time.Time
	// Detail is one sentence for people.
	Detail string

	// Full asks a Ledger to keep the record itself, not only to count it. It
	// is not written.
	Full bool
	// Open lets the call go on when the record cannot be kept. The loss is
	// counted. It is not written.
	Open bool
	// Done says that the record speaks of what has happened already: refusing
	// it would undo nothing, so it is kept a little beyond the bound of the
	// spool. It is not written.
	Done bool
	// Tally is set by a Ledger that counts the call: tell it how it ended.
	Tally Tally
}

var (
	// ErrBroken is returned by Verify for a log that is not what was written.
	ErrBroken = errors.New("audit log is broken")
	// ErrClosed is returned for a log that was closed.
	ErrClosed = errors.New("audit log is closed")
	// ErrLocked is returned by Open when another process writes the log.
	ErrLocked = errors.New("another process writes this audit log; stop it or choose another path")
)
