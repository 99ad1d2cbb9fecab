package audit

import (
	"strings"
	"time"
	"unicode/utf8"
)

// Longest texts, in bytes. A SPIFFE ID has at most 2,048 (SPIFFE-ID section 2.3).
const (
	maxID     = 2100
	maxDetail = 1024
	maxWord   = 512
)

// maxLine bounds a line of the log, in bytes: all fields full, each byte
// escaped to six, and room for the keys.
const maxLine = 6*(2*maxID+2*maxDetail+11*maxWord) + 1024

const redacted = "[redacted]"

// clean makes a record fit to keep. It works on the caller's copy.
func clean(r *Record) {
	r.Kind = Kind(cut(string(r.Kind), maxWord))
	r.ID = cut(r.ID, maxWord)
	r.Decision = cut(r.Decision, maxWord)
	r.Reason = cut(r.Reason, maxWord)
	r.Rule = cut(r.Rule, maxWord)
	r.Dir = cut(r.Dir, maxWord)
	r.Src = cut(r.Src, maxID)
	r.Dst = cut(r.Dst, maxID)
	r.Verb = cut(r.Verb, maxWord)
	if i := strings.IndexAny(r.Path, "?#"); i >= 0 {
		r.Path = r.Path[:i]
	}
	r.Path = cut(redact(r.Path), maxDetail)
	r.Trace = cut(r.Trace, maxWord)
	r.Peer = cut(r.Peer, maxWord)
	r.Class = cut(r.Class, maxWord)
	r.Detail = cut(redact(r.Detail), maxDetail)
	for _, t := range []*time.Time{&r.Time, &r.From} {
		if y := t.UTC().Year(); y < 0 || y > 9999 {
			*t = time.Unix(0, 0)
		}
	}
}

// cut shortens s to at most limit bytes, on a rune boundary.
func cut(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	n := limit - len("…")
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + "…"
}

// redact replaces what must never be kept: JSON web tokens, which start with
// the base64 of `{"`, private keys in PEM, the credential after "Bearer ",
// "Basic " or "DPoP " in any case, and the userinfo of a URL.
func redact(s string) string {
	if len(s) < 8 {
		return s
	}
	s = redactAfter(s, "eyJ", 0)
	if strings.IndexByte(s, ' ') >= 0 {
		for _, scheme := range []string{"bearer ", "basic ", "dpop "} {
			s = redactAfter(s, scheme, len(scheme))
		}
	}
	if strings.Contains(s, "://") {
		s = redactUserinfo(s)
	}
	if i := strings.Index(s, "-----BEGIN "); i >= 0 {
		s = s[:i] + redacted
	}
	return s
}

// redactAfter replaces each word of at least eight bytes that follows mark;
// keep bytes of the mark stay.
func redactAfter(s, mark string, keep int) string {
	from := 0
	for {
		i := index(s[from:], mark)
		if i < 0 {
			return s
		}
		start := from + i + keep
		end := start
		for end < len(s) && isTokenByte(s[end]) {
			end++
		}
		if end-start < 8 {
			from = max(end, start+1)
			if from >= len(s) {
				return s
			}
			continue
		}
		s = s[:start] + redacted + s[end:]
		from = start + len(redacted)
	}
}

// index is strings.Index, but a mark that ends in a blank, the name of an HTTP
// scheme, is found in any case.
func index(s, mark string) int {
	if mark[len(mark)-1] != ' ' {
		return strings.Index(s, mark)
	}
	for i := 0; i+len(mark) <= len(s); i++ {
		if s[i+len(mark)-1] == ' ' && strings.EqualFold(s[i:i+len(mark)], mark) {
			return i
		}
	}
	return -1
}

// redactUserinfo replaces what stands between "://" and the last "@" of the
// same authority.
func redactUserinfo(s string) string {
	for from := 0; ; {
		i := strings.Index(s[from:], "://")
		if i < 0 {
			return s
		}
		start := from + i + len("://")
		end := start
		for end < len(s) && strings.IndexByte("/?# \t\"", s[end]) < 0 {
			end++
		}
		from = start
		if at := strings.LastIndexByte(s[start:end], '@'); at >= 0 {
			s = s[:start] + redacted + s[start+at:]
			from = start + len(redacted)
		}
	}
}

// isTokenByte holds for the characters of base64, base64url and token68.
func isTokenByte(c byte) bool {
	switch {
	case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		return true
	}
	return strings.IndexByte("-._~+/=", c) >= 0
}
