package audit

import (
	"encoding/hex"
	"fmt"
	"io"
	"time"
)

// A Verdict is the answer to one question about a log.
type Verdict struct {
	OK bool `json:"ok"`
	// Unconfirmed: nothing is wrong, but nothing outside of the log says that
	// it is right, either.
	Unconfirmed bool `json:"unconfirmed,omitempty"`
	// Line is the first line that is wrong, from 1; 0 when no line is.
	Line int `json:"line,omitempty"`
	// Detail says what is wrong, or what was confirmed.
	Detail string `json:"detail,omitempty"`
}

// failed says that the answer is no.
func (v *Verdict) failed() bool { return !v.OK && !v.Unconfirmed }

// fail keeps the first thing that is wrong.
func (v *Verdict) fail(line int, format string, args ...any) {
	if !v.failed() {
		*v = Verdict{Line: line, Detail: fmt.Sprintf(format, args...)}
	}
}

// doubt says what is not confirmed, unless something is wrong.
func (v *Verdict) doubt(format string, args ...any) {
	if v.OK {
		*v = Verdict{Unconfirmed: true, Detail: fmt.Sprintf(format, args...)}
	}
}

// A Report is what Verify found.
type Report struct {
	// Records counts the lines that are records, Gaps those of KindGap.
	Records uint64 `json:"records"`
	Gaps    uint64 `json:"gaps"`
	// First and Last are the numbers of the first and last record.
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
	// Kept says what was removed by rule before First; nil when nothing was.
	Kept *Kept `json:"kept,omitempty"`
	// Head is the hash of the last line in hex. A chain alone cannot show that
	// its end was cut off.
	Head string `json:"head"`
	// Integrity: each line is a record and holds the hash of the line before,
	// and the tree over them is the one that was signed.
	Integrity Verdict `json:"integrity"`
	// Completeness: the log starts with record 1, or with the one that signed
	// evidence of a removal names, no number is missing, the last line is whole,
	// and no less is there than was signed.
	Completeness Verdict `json:"completeness"`
	// Identity: whose log it is, as a witness has signed it.
	Identity Verdict `json:"identity"`
	// Time: no record is more than clockSlack earlier than the one before, nor
	// later than when a witness signed it.
	Time Verdict `json:"time"`
}

// Kept is what a verified log goes on from.
type Kept struct {
	// From is the oldest record that is kept, Removed how many there were before
	// it.
	From    uint64 `json:"from"`
	Removed uint64 `json:"removed"`
	// At is when the last of them were removed, Rule by which rule.
	At   time.Time `json:"at"`
	Rule string    `json:"rule"`
}

func (k *Kept) String() string {
	return fmt.Sprintf("kept from record %d; %d before it were removed until %s by %s, evidence signed", k.From, k.Removed, k.At.UTC().Format(time.RFC3339), k.Rule)
}

// clockSlack is how far a clock may be set back without a word.
const clockSlack = time.Second

// Err is ErrBroken with the first verdict that is bad, if one is.
func (r *Report) Err() error {
	for _, v := range []struct {
		name string
		Verdict
	}{{"integrity", r.Integrity}, {"completeness", r.Completeness}, {"identity", r.Identity}, {"time", r.Time}} {
		switch {
		case !v.failed():
		case v.Line > 0:
			return fmt.Errorf("%w: %s: line %d: %s", ErrBroken, v.name, v.Line, v.Detail)
		default:
			return fmt.Errorf("%w: %s: %s", ErrBroken, v.name, v.Detail)
		}
	}
	return nil
}

// Confirmed reports whether every verdict is good, none only for want of
// knowledge.
func (r *Report) Confirmed() bool {
	return r.Integrity.OK && r.Completeness.OK && r.Identity.OK && r.Time.OK
}

// Verify reads a whole log and judges it by itself. The error is ErrBroken when a
// verdict is bad, or what kept it from reading; the Report is filled as far as
// it came.
func Verify(r io.Reader) (Report, error) {
	var v verifier
	return v.read(r)
}

func (v *verifier) read(r io.Reader) (Report, error) {
	yes := Verdict{OK: true}
	v.rep = Report{Integrity: yes, Completeness: yes, Time: yes, Identity: Verdict{Unconfirmed: true, Detail: "a log does not show by itself whose it is"}}
	err := readBlocks(r, v.each != nil, v.line, func() {
		v.rep.Completeness.fail(v.lines+1, "the last line is torn; opening the log again moves it away")
	})
	if err != nil {
		return v.rep, fmt.Errorf("read audit log: %w", err)
	}
	if v.lines == 0 {
		v.rep.Last, v.prev = v.gone.last(), v.gone.prev()
	}
	v.rep.Head = hex.EncodeToString(v.prev[:])
	return v.rep, v.rep.Err()
}

// verifier holds what one line must agree with.
type verifier struct {
	rep    Report
	lines  int
	gone   *removal // what was removed before
	prev   hash
	at     time.Time
	broken bool // the line before was no record: its successor cannot be judged
	// each is told every line, with its leaf; nil when nobody is.
	each func(*read)
}

func (v *verifier) line(l *read) {
	v.lines++
	n, r := v.lines, &l.rec
	want, broken := v.prev, v.broken
	v.prev, v.broken = l.sum, l.err != nil
	if v.each != nil {
		v.each(l)
	}
	if l.err != nil {
		v.rep.Integrity.fail(n, "%v", l.err)
		return
	}
	v.rep.Records++
	if r.Kind == KindGap {
		v.rep.Gaps++
	}
	switch {
	case n == 1:
		v.begins(r.Seq, l.prev)
	case l.prev != want:
		v.rep.Integrity.fail(n, "record %d does not hold the hash of the line before it: one of the two was changed", r.Seq)
	}
	if v.rep.Records == 1 {
		v.rep.First = r.Seq
	} else if r.Seq != v.rep.Last+1 && !broken {
		v.rep.Completeness.fail(n, "record %d follows record %d", r.Seq, v.rep.Last)
	}
	if r.Time.Before(v.at.Add(-clockSlack)) {
		v.rep.Time.fail(n, "record %d is %v earlier than the one before it", r.Seq, v.at.Sub(r.Time))
	}
	v.rep.Last, v.at = r.Seq, r.Time
}

// begins judges the first line.
func (v *verifier) begins(seq uint64, prev hash) {
	switch {
	case seq != v.gone.last()+1 && v.gone == nil:
		v.rep.Completeness.fail(1, "starts with record %d, not 1, and nothing says what became of those before", seq)
	case seq != v.gone.last()+1:
		v.rep.Completeness.fail(1, "starts with record %d; by the evidence of what was removed it is kept from record %d", seq, v.gone.last()+1)
	case prev != v.gone.prev() && v.gone == nil:
		v.rep.Integrity.fail(1, "record 1 names a record before it")
	case prev != v.gone.prev():
		v.rep.Integrity.fail(1, "record %d does not hold the hash of the last that was removed: one of the two was changed", seq)
	}
}
