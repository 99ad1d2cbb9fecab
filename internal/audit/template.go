package audit

// maxTemplate bounds a path template, in bytes.
const maxTemplate = 160

// Template is the shape of a path as roll-ups have it: "{}" stands for one
// segment, "**" at the end for what was too long.
func Template(path string) string { return string(appendTemplate(nil, path)) }

// appendTemplate writes the shape of a path: what looks like the name of one
// thing among many becomes "{}", so that the calls for each of them are
// counted together. A query is left out, and what is too long ends in "**".
func appendTemplate(b []byte, path string) []byte {
	for i := 0; i < len(path) && path[i] != '?' && path[i] != '#'; {
		start := i
		for i++; i < len(path) && path[i] != '/' && path[i] != '?' && path[i] != '#'; i++ {
		}
		seg := path[start:i]
		if one(seg) {
			seg = "/{}"
		}
		if len(b)+len(seg) > maxTemplate-len("/**") {
			return append(b, "/**"...)
		}
		b = append(b, seg...)
	}
	return b
}

// one says if a segment with its slash looks like an id: a digit among at most
// two other kinds of bytes, or anything longer than words are.
func one(seg string) bool {
	if len(seg) < 2 || seg[0] != '/' {
		return false
	}
	seg = seg[1:]
	if len(seg) > 32 {
		return true
	}
	digits, letters := 0, 0
	for i := 0; i < len(seg); i++ {
		switch c := seg[i]; {
		case c >= '0' && c <= '9':
			digits++
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z':
			letters++
		case c == '%', c >= 0x80:
			return true
		}
	}
	// "v1" and "oauth2" are words; "42", "c0ffee12" and UUIDs are not.
	return digits > 0 && (letters == 0 || digits > 2)
}
