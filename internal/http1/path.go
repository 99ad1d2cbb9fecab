package http1

// What may stand in a path, byte by byte.
const (
	pathBad     = iota
	pathPlain   // stands for itself
	pathEncode  // not allowed by RFC 3986 but sent raw by browsers: %XX
	pathPercent // begins an escape
	pathSlash
	pathParam // ';'
)

var pathClass = func() (t [256]uint8) {
	for _, c := range []byte("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-._~!$&'()*+,=:@") {
		t[c] = pathPlain
	}
	for _, c := range []byte("[]|^") {
		t[c] = pathEncode
	}
	t['%'], t['/'], t[';'] = pathPercent, pathSlash, pathParam
	return t
}()

const upperHex = "0123456789ABCDEF"

// CleanPath appends to dst the canonical form of an absolute path without
// query, and returns dst as it was with an error when the path is refused.
//
// Refused are bytes that RFC 3986 section 3.3 does not allow (but '[', ']',
// '|' and '^', which browsers send, are escaped), broken escapes, escapes of
// control bytes, '/' and '\', segments that are ".." after one decoding, and
// ';' unless params is true and a name other than "." stands before it in its
// segment. Then unreserved bytes are unescaped, other escapes get upper-case
// digits, "//" becomes "/", and "." segments go. Case and a trailing slash are
// kept. A double-encoded byte stays literal. The result is a fixed point of
// CleanPath.
func CleanPath(dst, path []byte, params bool) ([]byte, error) {
	if len(path) == 0 || path[0] != '/' {
		return dst, refuse(ReasonPath, "the path does not begin with a slash")
	}
	start := len(dst)
	dst = append(dst, '/')
	seg := len(dst) // where the current segment begins
	for i := 1; i < len(path); i++ {
		c := path[i]
		switch pathClass[c] {
		case pathPlain:
			dst = append(dst, c)
		case pathEncode:
			dst = append(dst, '%', upperHex[c>>4], upperHex[c&15])
		case pathPercent:
			d, ok := unescape(path[i:])
			if !ok || d < 0x20 || d == 0x7f || d == '/' || d == '\\' {
				return dst[:start], refuse(ReasonPath, "the path holds an escape that is broken or not allowed")
			}
			if i += 2; unreserved(d) {
				dst = append(dst, d)
			} else {
				dst = append(dst, '%', upperHex[d>>4], upperHex[d&15])
			}
		case pathSlash:
			keep, err := segment(dst[seg:])
			if err != nil {
				return dst[:start], err
			}
			if keep {
				dst = append(dst, '/')
			} else {
				dst = dst[:seg]
			}
			seg = len(dst)
		case pathParam:
			if !params {
				return dst[:start], refuse(ReasonPath, "the path holds a semicolon")
			}
			dst = append(dst, c)
		default:
			return dst[:start], refuse(ReasonPath, "the path holds a byte that must be escaped")
		}
	}
	keep, err := segment(dst[seg:])
	if err != nil {
		return dst[:start], err
	}
	if !keep {
		dst = dst[:seg]
	}
	return dst, nil
}

// segment judges one finished segment: keep is false for "" and ".".
func segment(s []byte) (keep bool, err error) {
	name := s
	for i, c := range s {
		if c == ';' {
			name = s[:i]
			break
		}
	}
	switch {
	case string(name) == "..":
		return false, refuse(ReasonPath, "the path holds a parent segment")
	case string(name) == "." && len(s) > 1:
		return false, refuse(ReasonPath, "the path holds a dot segment with parameters")
	case len(name) == 0 && len(s) > 0:
		return false, refuse(ReasonPath, "the path holds parameters of no segment")
	}
	return len(s) > 0 && string(s) != ".", nil
}

// appendBare appends a canonical path without the parameters of its segments,
// which is canonical too.
func appendBare(dst, path []byte) []byte {
	params := false
	for _, c := range path {
		switch c {
		case ';':
			params = true
		case '/':
			params = false
		}
		if !params {
			dst = append(dst, c)
		}
	}
	return dst
}

// plainPath is how many of the first bytes of path are canonical as they stand.
func plainPath(path []byte) int {
	prev := byte(0)
	for i, c := range path {
		switch pathClass[c] {
		case pathPlain:
			if c == '.' && prev == '/' {
				return i // perhaps a dot segment: let CleanPath tell
			}
		case pathSlash:
			if prev == '/' {
				return i
			}
		default:
			return i
		}
		prev = c
	}
	return len(path)
}

func unescape(b []byte) (byte, bool) {
	if len(b) < 3 {
		return 0, false
	}
	hi, lo := unhex(b[1]), unhex(b[2])
	return byte(hi<<4 | lo&15), hi|lo >= 0
}

// unhex gives the value of a hexadecimal digit, negative if c is none.
func unhex(c byte) int {
	switch {
	case '0' <= c && c <= '9':
		return int(c - '0')
	case 'a' <= c && c <= 'f':
		return int(c-'a') + 10
	case 'A' <= c && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}

func unreserved(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' ||
		c == '-' || c == '.' || c == '_' || c == '~'
}
