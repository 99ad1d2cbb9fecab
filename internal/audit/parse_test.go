package audit

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"math"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// byJSON is ParseLine by the standard library: it reads JSON in any form, writes
// the record again and compares.
func byJSON(b []byte) (r Record, prev hash, err error) {
	if len(b) > maxLine {
		return r, prev, errors.New("too long")
	}
	var j struct {
		V                                    int    `json:"v"`
		Seq                                  uint64 `json:"seq"`
		Time                                 string
		Kind                                 Kind
		ID, Decision, Reason, Rule, Dir, Src string
		Dst, Verb, Path, Trace, Peer         string
		Class, From, Detail, Prev            string
		Port                                 uint16
		Revision                             uint64 `json:"rev"`
		Up, Down                             int64
		MS                                   json.RawMessage
		Count                                uint64 `json:"n"`
		Total                                uint64
	}
	if err := json.Unmarshal(b, &j); err != nil {
		return r, prev, err
	}
	r = Record{
		Seq: j.Seq, Kind: j.Kind, ID: j.ID, Decision: j.Decision, Reason: j.Reason, Rule: j.Rule, Dir: j.Dir, Src: j.Src,
		Dst: j.Dst, Port: j.Port, Verb: j.Verb, Path: j.Path, Revision: j.Revision, Trace: j.Trace, Peer: j.Peer,
		BytesUp: j.Up, BytesDown: j.Down, Class: j.Class, Count: j.Count, Total: j.Total, Detail: j.Detail,
	}
	if r.Time, err = time.Parse(timeLayout, j.Time); err != nil {
		return r, prev, err
	}
	if j.From != "" {
		if r.From, err = time.Parse(timeLayout, j.From); err != nil {
			return r, prev, err
		}
	}
	if whole, frac, ok := strings.Cut(string(j.MS), "."); ok {
		ms, err1 := strconv.ParseUint(whole, 10, 64)
		us, err2 := strconv.ParseUint(frac, 10, 16)
		if err1 != nil || err2 != nil || ms > math.MaxInt64/uint64(time.Millisecond) {
			return r, prev, errors.New("ms")
		}
		r.Duration = time.Duration(ms)*time.Millisecond + time.Duration(us)*time.Microsecond
	}
	if n, err := hex.Decode(prev[:], []byte(cut(j.Prev, 2*len(prev)))); err != nil || n != len(prev) {
		return r, prev, errors.New("prev")
	}
	if !bytes.Equal(appendRecord(nil, &r, &prev), b) {
		return r, prev, errors.New("another form")
	}
	return r, prev, nil
}

// lineSeeds are good lines, and such as differ from one in something small.
func lineSeeds(t testing.TB) (out [][]byte) {
	t.Helper()
	l := NewMemory()
	full := Record{
		Kind: KindEgressClose, ID: "abc-3", Decision: Deny, Reason: "rule", Rule: "r", Dir: "out", Src: "s", Dst: "d",
		Port: 65535, Verb: "V", Path: "/p", Revision: math.MaxUint64, Trace: "t", Peer: "p", BytesUp: math.MinInt64,
		BytesDown: math.MaxInt64, Duration: math.MaxInt64, Class: "2xx", Count: 7, Total: 8,
		Time: time.Date(2024, 2, 29, 23, 59, 59, 999999999, time.UTC), From: time.Date(9999, 12, 31, 0, 0, 0, 1, time.UTC),
		Detail: "a \"q\" \\ \n \x1b[31m \u202e é \xff \ufffd \U000e0001 \U0001f600 \u2028",
	}
	for _, r := range []Record{full, sample(), {Kind: KindGap}, {}} {
		if err := l.Append(&r); err != nil {
			t.Fatal(err)
		}
	}
	for b := range bytes.Lines(l.Lines()) {
		out = append(out, b)
	}
	line := string(out[0])
	for _, c := range [][2]string{
		{`"port":65535`, `"port":65536`}, {`"port":65535`, `"port":0`}, {`"port":65535`, `"port":065`}, {`"port":65535`, `"port":1e3`},
		{`"rev":18446744073709551615`, `"rev":18446744073709551616`}, {`"up":-9223372036854775808`, `"up":-9223372036854775809`},
		{`"up":-9223372036854775808`, `"up":-0`}, {`"down":9223372036854775807`, `"down":9223372036854775808`},
		{`"ms":9223372036854.775`, `"ms":9223372036854.776`}, {`"ms":9223372036854.775`, `"ms":0.000`}, {`"ms":9223372036854.775`, `"ms":0.001`},
		{`"ms":9223372036854.775`, `"ms":01.000`}, {`"ms":9223372036854.775`, `"ms":1.0000`}, {`"ms":9223372036854.775`, `"ms":1`},
		{"2024-02-29", "2023-02-29"}, {"2024-02-29", "2024-13-01"}, {"2024-02-29", "2024-00-10"}, {"2024-02-29", "2024-04-31"}, {"2024-02-29", "0000-01-01"},
		{"T23:59:59", "T24:00:00"}, {"T23:59:59", "T23:59:60"}, {"T23:59:59", "t23:59:59"}, {"59.999999999Z", "59,999999999Z"}, {"59.999999999Z", "59.99999999Z"},
		{"9999-12-31T00:00:00.000000001Z", "0001-01-01T00:00:00.000000000Z"}, {"9999-12-31T00:00:00.000000001Z", "0001-01-01T00:00:00.000000001Z"},
		{`"rule":"r"`, `"rule":""`}, {`"rule":"r",`, ``}, {`,"dir":"out","src":"s"`, `,"src":"s","dir":"out"`}, {`"dir":"out"`, `"DIR":"out"`},
		{`\"q\"`, `\u0022q\u0022`}, {`\u000a`, `\n`}, {`\u000a`, `\u000A`}, {`\u001b`, "\x1b"}, {`\u202e`, "\u202e"}, {"é", `\u00e9`}, {"é", "\xe9"}, {"é", "\xc0\xaf"},
		{`\udb40\udc01`, "\U000e0001"}, {`\udb40\udc01`, `\udb40`}, {`\udb40\udc01`, `\udb40\ud800`}, {`\udb40\udc01`, `\udc01`}, {`\udb40\udc01`, `\ud83d\ude00`},
		{`\\`, `\/`}, {`\\`, `\`}, {`"v":1`, `"v":2`}, {`"v":1,`, ``}, {`"seq":1`, `"seq":0`}, {`"seq":1`, `"seq":-1`}, {`"prev":"00`, `"prev":"0`},
		{`"prev":"00`, `"prev":"0A`}, {`"prev":"00`, `"prev":"0g`}, {`"prev":"00`, `"prev":"0000`}, {"\"}\n", "\"}"}, {"\"}\n", "\"}\n\n"}, {"\"}\n", "\"}\r\n"},
		{"\"}\n", "\"} \n"}, {"\"}\n", "\",\"x\":1}\n"}, {`{"v"`, ` {"v"`}, {"\"}\n", ""},
	} {
		if changed := strings.Replace(line, c[0], c[1], 1); changed != line {
			out = append(out, []byte(changed))
		} else {
			t.Errorf("no %q in %s", c[0], line)
		}
	}
	return append(out, nil, []byte("\n"), []byte("{}\n"), bytes.Repeat([]byte("x"), maxLine+1))
}

// agree holds ParseLine to byJSON.
func agree(t *testing.T, b []byte) {
	t.Helper()
	want, wantPrev, wantErr := byJSON(b)
	got, prev, err := ParseLine(b)
	if (err == nil) != (wantErr == nil) {
		t.Fatalf("%q: error %v, by JSON %v", b, err, wantErr)
	}
	if err != nil {
		return
	}
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(Tally{})); d != "" || prev != wantPrev {
		t.Errorf("%q: %s", b, d)
	}
}

func TestParseLineAgreesWithJSON(t *testing.T) {
	good := 0
	for _, b := range lineSeeds(t) {
		agree(t, b)
		if _, _, err := ParseLine(b); err == nil {
			good++
		}
	}
	if good < 5 {
		t.Errorf("%d lines are good", good)
	}
}

func FuzzParseLine(f *testing.F) {
	for _, b := range lineSeeds(f) {
		f.Add(b)
	}
	f.Fuzz(agree)
}

// TestVerifyReadsBlocks has lines end at, before and after the ends of blocks.
func TestVerifyReadsBlocks(t *testing.T) {
	l := NewMemory()
	for i := range 200 {
		r := sample()
		r.Src = strings.Repeat("s", (i*i*7)%maxID)
		if i%10 == 0 {
			r.Detail = strings.Repeat("\x01", maxDetail)
		}
		if err := l.Append(&r); err != nil {
			t.Fatal(err)
		}
	}
	good := l.Lines()
	for pad := range 40 {
		for len(good) < 4*blockSize+pad*31 {
			mustAppend(t, l, 1)
			good = l.Lines()
		}
		_, sum := l.Head()
		rep, err := Verify(bytes.NewReader(good))
		if seq, _ := l.Head(); err != nil || rep.Records != seq || rep.Head != hex.EncodeToString(sum[:]) {
			t.Fatalf("%d bytes: %d records, %v", len(good), rep.Records, err)
		}
	}
	long := bytes.Repeat([]byte("x"), 2*blockSize)
	for name, tc := range map[string]struct {
		log                     []byte
		integrity, completeness int
	}{
		"a long line in between":       {bytes.Join([][]byte{good, long, []byte("\n"), good}, nil), 1 + bytes.Count(good, []byte("\n")), 0},
		"a long line without an end":   {append(bytes.Clone(good), long...), 1 + bytes.Count(good, []byte("\n")), 2 + bytes.Count(good, []byte("\n"))},
		"a torn line after many lines": {append(bytes.Clone(good), good[:100]...), 0, 1 + bytes.Count(good, []byte("\n"))},
	} {
		rep, err := Verify(bytes.NewReader(tc.log))
		if !errors.Is(err, ErrBroken) || rep.Integrity.Line != tc.integrity || rep.Completeness.Line != tc.completeness {
			t.Errorf("%s: %+v %v, want lines %d and %d", name, rep, err, tc.integrity, tc.completeness)
		}
	}
}
