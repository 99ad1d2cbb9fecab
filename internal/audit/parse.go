package audit

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"time"
	"unicode/utf16"
	"unicode/utf8"
)

// ParseLine reads one line of a log with its line feed, and the hash of the
// line before it. Only the exact form that Append writes is accepted: what is
// hashed has one reading, and a record one line.
func ParseLine(b []byte) (Record, [32]byte, error) {
	if len(b) > maxLine {
		return Record{}, hash{}, fmt.Errorf("line of %d bytes is longer than any record", len(b))
	}
	return parseLine(string(b))
}

// parseLine is ParseLine of a text, which the record goes on to hold.
func parseLine(s string) (r Record, prev hash, err error) {
	p := parser{rest: s}
	p.need(`{"v":1,"seq":`)
	r.Seq = p.count(true)
	p.need(`,"time":`)
	r.Time = p.time()
	r.Kind = Kind(p.field(`,"kind":`))
	r.ID = p.field(`,"id":`)
	r.Decision = p.field(`,"decision":`)
	r.Reason = p.field(`,"reason":`)
	r.Rule = p.field(`,"rule":`)
	r.Dir = p.field(`,"dir":`)
	r.Src = p.field(`,"src":`)
	r.Dst = p.field(`,"dst":`)
	if p.has(`,"port":`) {
		n := p.count(false)
		p.hold(n <= math.MaxUint16, "a port")
		r.Port = uint16(n) //nolint:gosec // held to it
	}
	r.Verb = p.field(`,"verb":`)
	r.Path = p.field(`,"path":`)
	if p.has(`,"rev":`) {
		r.Revision = p.count(false)
	}
	r.Trace = p.field(`,"trace":`)
	r.Peer = p.field(`,"peer":`)
	if p.has(`,"up":`) {
		r.BytesUp = p.number()
	}
	if p.has(`,"down":`) {
		r.BytesDown = p.number()
	}
	if p.has(`,"ms":`) {
		r.Duration = p.millis()
	}
	r.Class = p.field(`,"class":`)
	if p.has(`,"n":`) {
		r.Count = p.count(false)
	}
	if p.has(`,"total":`) {
		r.Total = p.count(false)
	}
	if p.has(`,"from":`) {
		r.From = p.time()
		p.hold(!r.From.IsZero(), "a time after the year 1")
	}
	r.Detail = p.field(`,"detail":`)
	p.hold(p.has(`,"prev":"`), "a key that may come next, at last prev")
	prev = p.hash()
	p.need("\"}\n")
	p.hold(p.rest == "", "the end of the line")
	if p.want != "" {
		return Record{}, hash{}, fmt.Errorf("not a record in the form in which it was written: at byte %d, want %s", len(s)-p.left, p.want)
	}
	return r, prev, nil
}

// A parser reads a line from its beginning.
type parser struct {
	rest string
	// want is what the first mistake is in place of, and left how much of the
	// line came from there on.
	want string
	left int
}

// hold notes a mistake, unless ok. After one nothing more is read.
func (p *parser) hold(ok bool, want string) bool {
	if !ok && p.want == "" {
		p.want, p.left = want, len(p.rest)
		p.rest = ""
	}
	return ok
}

func (p *parser) has(key string) (ok bool) {
	if ok = strings.HasPrefix(p.rest, key); ok {
		p.rest = p.rest[len(key):]
	}
	return ok
}

func (p *parser) need(key string) { p.hold(p.has(key), key) }

// field reads a text if its key comes next. An empty one is not written.
func (p *parser) field(key string) string {
	if !p.has(key) {
		return ""
	}
	s := p.text()
	p.hold(s != "", "a text")
	return s
}

// text reads a string as appendString writes it.
func (p *parser) text() string {
	if !p.hold(strings.HasPrefix(p.rest, `"`), "a string") {
		return ""
	}
	s := p.rest[1:]
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"':
			p.rest = s[i+1:]
			return s[:i]
		case c < 0x20 || c == 0x7f:
			p.rest = s[i:]
			p.hold(false, "what prints")
			return ""
		case c == '\\' || c >= utf8.RuneSelf:
			return p.escaped(s)
		}
	}
	p.hold(false, "a string with an end")
	return ""
}

// escaped reads a string that holds escapes or more than ASCII. It is written
// again and compared, since there are many ways to escape and one is ours.
func (p *parser) escaped(s string) string {
	end := 0
	for end < len(s) && s[end] != '"' {
		if s[end] == '\\' {
			end++
		}
		end++
	}
	if !p.hold(end < len(s), "a string with an end") {
		return ""
	}
	v, ok := unescape(s[:end])
	if ok {
		again := appendString(make([]byte, 0, end+2), v)
		ok = string(again[1:len(again)-1]) == s[:end]
	}
	if !p.hold(ok, "a string that is escaped as Append does") {
		return ""
	}
	p.rest = s[end+1:]
	return v
}

func unescape(s string) (string, bool) {
	var out strings.Builder
	for {
		i := strings.IndexByte(s, '\\')
		if i < 0 {
			out.WriteString(s)
			return out.String(), true
		}
		out.WriteString(s[:i])
		if s = s[i+1:]; s == "" {
			return "", false
		}
		if s[0] != 'u' {
			out.WriteByte(s[0])
			s = s[1:]
			continue
		}
		r, ok := hex4(s[1:])
		if !ok {
			return "", false
		}
		s = s[5:]
		if utf16.IsSurrogate(r) {
			low, ok := hex4(strings.TrimPrefix(s, `\u`))
			if !ok || !strings.HasPrefix(s, `\u`) {
				return "", false
			}
			r, s = utf16.DecodeRune(r, low), s[6:]
		}
		out.WriteRune(r)
	}
}

func hex4(s string) (r rune, ok bool) {
	if len(s) < 4 {
		return 0, false
	}
	for i := range 4 {
		n := nibble(s[i])
		if n < 0 {
			return 0, false
		}
		r = r<<4 | rune(n)
	}
	return r, true
}

// nibble is the value of a hex digit, -1 of anything else.
func nibble(c byte) int {
	switch {
	case c >= '0' && c <= '9':
		return int(c - '0')
	case c >= 'a' && c <= 'f':
		return int(c-'a') + 10
	}
	return -1
}

// count reads a number without a sign. Nought is written of few fields.
func (p *parser) count(nought bool) (n uint64) {
	i := 0
	for ; i < len(p.rest) && p.rest[i] >= '0' && p.rest[i] <= '9'; i++ {
		d := uint64(p.rest[i] - '0')
		if n > (math.MaxUint64-d)/10 {
			p.hold(false, "a number of 64 bits")
			return 0
		}
		n = n*10 + d
	}
	if !p.hold(i > 0 && (p.rest[0] != '0' || nought && i == 1), "a number as it is written") {
		return 0
	}
	p.rest = p.rest[i:]
	return n
}

// number reads a number that may be negative, and is not nought.
func (p *parser) number() int64 {
	minus := p.has("-")
	n := p.count(false)
	if minus {
		p.hold(n <= 1<<63, "a number of 64 bits")
		return -int64(n) //nolint:gosec // the least number is its own negative
	}
	p.hold(n <= math.MaxInt64, "a number of 64 bits")
	return int64(n) //nolint:gosec // held to it
}

// millis reads milliseconds with three digits behind the point.
func (p *parser) millis() time.Duration {
	whole := p.count(true)
	p.need(".")
	us, ok := digits(p.rest, 3)
	const most = math.MaxInt64 / uint64(time.Microsecond)
	if !p.hold(ok && whole <= (most-us)/1000 && whole+us > 0, "a number like 12.345") {
		return 0
	}
	p.rest = p.rest[3:]
	return time.Duration(whole*1000+us) * time.Microsecond //nolint:gosec // held to it
}

// digits reads n decimal digits.
func digits(s string, n int) (v uint64, ok bool) {
	if len(s) < n {
		return 0, false
	}
	for i := range n {
		if s[i] < '0' || s[i] > '9' {
			return 0, false
		}
		v = v*10 + uint64(s[i]-'0')
	}
	return v, true
}

// time reads a time as appendTime writes it.
func (p *parser) time() time.Time {
	p.need(`"`)
	t, err := parseTime(p.rest)
	if !p.hold(err == nil, "a time like "+timeLayout) {
		return time.Time{}
	}
	p.rest = p.rest[len(timeLayout):]
	p.need(`"`)
	return t
}

var errTime = errors.New("not a time")

// parseTime reads the time at the beginning of s; it costs a fifth of Parse.
func parseTime(s string) (time.Time, error) {
	if len(s) < len(timeLayout) {
		return time.Time{}, errTime
	}
	var n [7]int
	at := 0
	for i, f := range [...]struct {
		width int
		after byte
	}{{4, '-'}, {2, '-'}, {2, 'T'}, {2, ':'}, {2, ':'}, {2, '.'}, {9, 'Z'}} {
		v, ok := digits(s[at:], f.width)
		if !ok || s[at+f.width] != f.after {
			return time.Time{}, errTime
		}
		n[i] = int(v) //nolint:gosec // at most nine digits
		at += f.width + 1
	}
	if n[1] < 1 || n[1] > 12 || n[2] < 1 || n[2] > 31 || n[3] > 23 || n[4] > 59 || n[5] > 59 {
		return time.Time{}, errTime
	}
	t := time.Date(n[0], time.Month(n[1]), n[2], n[3], n[4], n[5], n[6], time.UTC)
	if t.Day() != n[2] { // of a month that has fewer
		return time.Time{}, errTime
	}
	return t, nil
}

// hash reads a SHA-256 in hex.
func (p *parser) hash() (h hash) {
	if !p.hold(len(p.rest) >= 2*len(h), "a SHA-256 in hex") {
		return h
	}
	for i := range h {
		hi, lo := nibble(p.rest[2*i]), nibble(p.rest[2*i+1])
		if !p.hold(hi >= 0 && lo >= 0, "a SHA-256 in hex") {
			return hash{}
		}
		h[i] = byte(hi<<4 | lo) //nolint:gosec // two nibbles
	}
	p.rest = p.rest[2*len(h):]
	return h
}
