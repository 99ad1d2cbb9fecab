package audit

import (
	"encoding/hex"
	"strconv"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// hash is a SHA-256.
type hash = [32]byte

// appendRecord writes the one form of a record: keys in this order, no blanks,
// empty fields left out, a line feed at the end. The hash of a line covers all
// of it, the line feed too.
func appendRecord(b []byte, r *Record, prev *hash) []byte {
	b = append(b, `{"v":1,"seq":`...)
	b = strconv.AppendUint(b, r.Seq, 10)
	b = append(b, `,"time":"`...)
	b = appendTime(b, r.Time)
	b = append(b, '"')
	b = appendField(b, `,"kind":`, string(r.Kind))
	b = appendField(b, `,"id":`, r.ID)
	b = appendField(b, `,"decision":`, r.Decision)
	b = appendField(b, `,"reason":`, r.Reason)
	b = appendField(b, `,"rule":`, r.Rule)
	b = appendField(b, `,"dir":`, r.Dir)
	b = appendField(b, `,"src":`, r.Src)
	b = appendField(b, `,"dst":`, r.Dst)
	b = appendNumber(b, `,"port":`, int64(r.Port))
	b = appendField(b, `,"verb":`, r.Verb)
	b = appendField(b, `,"path":`, r.Path)
	b = appendCount(b, `,"rev":`, r.Revision)
	b = appendField(b, `,"trace":`, r.Trace)
	b = appendField(b, `,"peer":`, r.Peer)
	b = appendNumber(b, `,"up":`, r.BytesUp)
	b = appendNumber(b, `,"down":`, r.BytesDown)
	b = appendMillis(b, `,"ms":`, r.Duration)
	b = appendField(b, `,"class":`, r.Class)
	b = appendCount(b, `,"n":`, r.Count)
	b = appendCount(b, `,"total":`, r.Total)
	if !r.From.IsZero() {
		b = append(b, `,"from":"`...)
		b = append(appendTime(b, r.From), '"')
	}
	b = appendField(b, `,"detail":`, r.Detail)
	b = append(b, `,"prev":"`...)
	b = hex.AppendEncode(b, prev[:])
	return append(b, '"', '}', '\n')
}

func appendField(b []byte, key, v string) []byte {
	if v == "" {
		return b
	}
	b = append(b, key...)
	return appendString(b, v)
}

func appendNumber(b []byte, key string, v int64) []byte {
	if v == 0 {
		return b
	}
	b = append(b, key...)
	return strconv.AppendInt(b, v, 10)
}

func appendCount(b []byte, key string, v uint64) []byte {
	if v == 0 {
		return b
	}
	b = append(b, key...)
	return strconv.AppendUint(b, v, 10)
}

func appendMillis(b []byte, key string, d time.Duration) []byte {
	us := d / time.Microsecond
	if us <= 0 {
		return b
	}
	b = append(b, key...)
	b = strconv.AppendInt(b, int64(us/1000), 10)
	b = append(b, '.')
	return appendDigits(b, int(us%1000), 3)
}

// appendDigits writes the last n decimal digits of v.
func appendDigits(b []byte, v, n int) []byte {
	at := len(b)
	b = append(b, "000000000"[:n]...)
	for i := n - 1; i >= 0; i-- {
		b[at+i] = byte('0' + v%10)
		v /= 10
	}
	return b
}

// timeLayout is the form that appendTime writes; it costs a third of Format.
const timeLayout = "2006-01-02T15:04:05.000000000Z"

func appendTime(b []byte, t time.Time) []byte {
	t = t.UTC()
	year, month, day := t.Date()
	hour, minute, sec := t.Clock()
	b = appendDigits(b, year, 4)
	b = append(b, '-')
	b = appendDigits(b, int(month), 2)
	b = append(b, '-')
	b = appendDigits(b, day, 2)
	b = append(b, 'T')
	b = appendDigits(b, hour, 2)
	b = append(b, ':')
	b = appendDigits(b, minute, 2)
	b = append(b, ':')
	b = appendDigits(b, sec, 2)
	b = append(b, '.')
	b = appendDigits(b, t.Nanosecond(), 9)
	return append(b, 'Z')
}

const hexDigits = "0123456789abcdef"

// appendString writes s as a JSON string. Besides what RFC 8259 section 7 asks
// for, it escapes everything that does not print: whoever looks at the file
// with a terminal must not be steered by what a caller sent. Bytes that are no
// UTF-8 become U+FFFD.
func appendString(b []byte, s string) []byte {
	b = append(b, '"')
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			if c >= 0x20 && c != '"' && c != '\\' && c != 0x7f {
				i++
				continue
			}
			b = append(b, s[start:i]...)
			if c == '"' || c == '\\' {
				b = append(b, '\\', c)
			} else {
				b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
			}
			i++
			start = i
			continue
		}
		r, n := utf8.DecodeRuneInString(s[i:])
		if r == utf8.RuneError && n == 1 || !unicode.IsPrint(r) {
			b = append(b, s[start:i]...)
			b = appendRune(b, r)
			i += n
			start = i
			continue
		}
		i += n
	}
	b = append(b, s[start:]...)
	return append(b, '"')
}

// appendRune writes a rune that does not print, or the replacement character.
func appendRune(b []byte, r rune) []byte {
	if r == utf8.RuneError {
		return utf8.AppendRune(b, r)
	}
	if r > 0xffff {
		hi, lo := utf16.EncodeRune(r)
		return appendEscape(appendEscape(b, hi), lo)
	}
	return appendEscape(b, r)
}

func appendEscape(b []byte, r rune) []byte {
	return append(b, '\\', 'u', hexDigits[r>>12&15], hexDigits[r>>8&15], hexDigits[r>>4&15], hexDigits[r&15])
}
