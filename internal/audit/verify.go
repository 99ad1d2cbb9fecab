package audit

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"time"
)

// line is the JSON form of a record, for reading.
type line struct {
	V        int             `json:"v"`
	Seq      uint64          `json:"seq"`
	Time     string          `json:"time"`
	Kind     Kind            `json:"kind"`
	ID       string          `json:"id"`
	Decision string          `json:"decision"`
	Reason   string          `json:"reason"`
	Rule     string          `json:"rule"`
	Dir      string          `json:"dir"`
	Src      string          `json:"src"`
	Dst      string          `json:"dst"`
	Port     uint16          `json:"port"`
	Verb     string          `json:"verb"`
	Path     string          `json:"path"`
	Revision uint64          `json:"rev"`
	Trace    string          `json:"trace"`
	Peer     string          `json:"peer"`
	Up       int64           `json:"up"`
	Down     int64           `json:"down"`
	MS       json.RawMessage `json:"ms"`
	Class    string          `json:"class"`
	Count    uint64          `json:"n"`
	Total    uint64          `json:"total"`
	From     string          `json:"from"`
	Detail   string          `json:"detail"`
	Prev     string          `json:"prev"`
}

// ParseLine reads one line of a log with its line feed, and the hash of the
// line before it. Only the exact form that Append writes is accepted: the line
// is written again and compared.
func ParseLine(b []byte) (Record, [32]byte, error) {
	var prev hash
	if len(b) > maxLine {
		return Record{}, prev, fmt.Errorf("line of %d bytes is longer than any record", len(b))
	}
	var j line
	if err := json.Unmarshal(b, &j); err != nil {
		return Record{}, prev, fmt.Errorf("not a record: %w", err)
	}
	if j.V != 1 {
		return Record{}, prev, fmt.Errorf("record of version %d, want 1", j.V)
	}
	t, err := time.Parse(timeLayout, j.Time)
	if err != nil {
		return Record{}, prev, errors.New("time is not like " + timeLayout)
	}
	var from time.Time
	if j.From != "" {
		if from, err = time.Parse(timeLayout, j.From); err != nil {
			return Record{}, prev, errors.New("from is not like " + timeLayout)
		}
	}
	d, err := parseMillis(string(j.MS))
	if err != nil {
		return Record{}, prev, err
	}
	if n, err := hex.Decode(prev[:], []byte(cut(j.Prev, 2*len(prev)))); err != nil || n != len(prev) {
		return Record{}, hash{}, errors.New("prev is not a SHA-256 in hex")
	}
	r := Record{
		Seq: j.Seq, Time: t, Kind: j.Kind, ID: j.ID, Decision: j.Decision, Reason: j.Reason,
		Rule: j.Rule, Dir: j.Dir, Src: j.Src, Dst: j.Dst, Port: j.Port, Verb: j.Verb, Path: j.Path,
		Revision: j.Revision, Trace: j.Trace, Peer: j.Peer, BytesUp: j.Up, BytesDown: j.Down,
		Duration: d, Class: j.Class, Count: j.Count, Total: j.Total, From: from, Detail: j.Detail,
	}
	if !bytes.Equal(appendRecord(make([]byte, 0, len(b)), &r, &prev), b) {
		return Record{}, prev, errors.New("record is not in the form in which it was written")
	}
	return r, prev, nil
}

func parseMillis(s string) (time.Duration, error) {
	if s == "" {
		return 0, nil
	}
	whole, frac, ok := strings.Cut(s, ".")
	ms, err1 := strconv.ParseUint(whole, 10, 64)
	us, err2 := strconv.ParseUint(frac, 10, 16)
	if !ok || len(frac) != 3 || err1 != nil || err2 != nil || ms > math.MaxInt64/uint64(time.Millisecond) {
		return 0, errors.New("ms is not a number like 12.345")
	}
	return time.Duration(ms)*time.Millisecond + time.Duration(us)*time.Microsecond, nil
}

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
	// Head is the hash of the last line in hex. A chain alone cannot show that
	// its end was cut off.
	Head string `json:"head"`
	// Integrity: each line is a record and holds the hash of the line before,
	// and the tree over them is the one that was signed.
	Integrity Verdict `json:"integrity"`
	// Completeness: the log starts with record 1, no number is missing, the
	// last line is whole, and no less is there than was signed.
	Completeness Verdict `json:"completeness"`
	// Identity: whose log it is, as a witness has signed it.
	Identity Verdict `json:"identity"`
	// Time: no record is more than clockSlack earlier than the one before, nor
	// later than when a witness signed it.
	Time Verdict `json:"time"`
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
	v := verifier{each: func([]byte, *Record) {}}
	return v.read(r)
}

func (v *verifier) read(r io.Reader) (Report, error) {
	yes := Verdict{OK: true}
	v.rep = Report{Integrity: yes, Completeness: yes, Time: yes, Identity: Verdict{Unconfirmed: true, Detail: "a log does not show by itself whose it is"}}
	br := bufio.NewReaderSize(r, maxLine+1)
	for n := 1; ; n++ {
		b, err := br.ReadSlice('\n')
		switch {
		case err == nil:
			v.line(n, b)
		case errors.Is(err, bufio.ErrBufferFull):
			v.rep.Integrity.fail(n, "longer than any record")
			v.broken = true
			for errors.Is(err, bufio.ErrBufferFull) {
				_, err = br.ReadSlice('\n')
			}
			if err != nil && !errors.Is(err, io.EOF) {
				return v.rep, fmt.Errorf("read audit log: %w", err)
			}
		case errors.Is(err, io.EOF):
			if len(b) > 0 {
				v.rep.Completeness.fail(n, "the last line is torn; opening the log again moves it away")
			}
			v.rep.Head = hex.EncodeToString(v.prev[:])
			return v.rep, v.rep.Err()
		default:
			return v.rep, fmt.Errorf("read audit log: %w", err)
		}
	}
}

// verifier holds what one line must agree with.
type verifier struct {
	rep    Report
	prev   hash
	at     time.Time
	broken bool // the line before was no record: its successor cannot be judged
	// each is told every whole line, and its record if it is one.
	each func([]byte, *Record)
}

func (v *verifier) line(n int, b []byte) {
	r, prev, err := ParseLine(b)
	want, broken := v.prev, v.broken
	v.prev, v.broken = sha256.Sum256(b), err != nil
	if err != nil {
		v.rep.Integrity.fail(n, "%v", err)
		v.each(b, nil)
		return
	}
	v.each(b, &r)
	v.rep.Records++
	if r.Kind == KindGap {
		v.rep.Gaps++
	}
	switch {
	case n == 1:
		if r.Seq != 1 {
			v.rep.Completeness.fail(n, "starts with record %d, not 1", r.Seq)
		} else if prev != (hash{}) {
			v.rep.Integrity.fail(n, "record 1 names a record before it")
		}
	case prev != want:
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
