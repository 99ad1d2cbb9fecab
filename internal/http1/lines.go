package http1

// A peer says most of its field lines again with each message on a connection.
// The lines of the last head are kept with what was found in them: a line that
// comes again at its place is compared, and not read anew.
type lines struct {
	text []byte // the lines, each with its CRLF
	at   []line
}

// A line is where the field stands in it. All but kind is in bytes.
type line struct {
	size, name, from, to uint16
	kind                 kind
	plain                bool
}

const (
	// maxKept bounds the text that is kept for a connection, bytes.
	maxKept = 1 << 10
	// maxKeptLines bounds its lines; each takes as much as ten bytes of text.
	maxKeptLines = 32
)

// A reading goes through a head line by line, beside those that are kept.
type reading struct {
	said  *lines
	n, at int  // the line, and where it begins in what is kept
	news  bool // something differs from what is kept
	keeps bool // what differs is noted
}

// read begins a reading of lines. The nil *lines keeps nothing.
func (l *lines) read(b []byte) reading {
	return reading{said: l, keeps: l != nil && len(b) <= maxKept}
}

// again gives the field of the first line of b if that is the one which is kept,
// and the size of the line; 0 if it is not.
func (r *reading) again(b []byte) (fd Field, size int) {
	if r.said == nil || r.n >= len(r.said.at) {
		return fd, 0
	}
	l := &r.said.at[r.n]
	text := r.said.text[r.at : r.at+int(l.size)]
	r.at += len(text)
	if len(b) < len(text) || string(b[:len(text)]) != string(text) {
		return fd, 0
	}
	r.n++
	return Field{b[:l.name], b[l.from:l.to], l.kind, l.plain}, len(text)
}

// note keeps a line that was read anew, of this size with its CRLF, in place of
// the one that again has compared.
func (r *reading) note(fd *Field, size, from int) {
	r.news = true
	n := r.n
	r.n++ // kept or not: at stands behind the line that again has compared
	if !r.keeps {
		return
	}
	if n == maxKeptLines {
		r.keeps = false
		return
	}
	l := line{uint16(size), uint16(len(fd.Name)), uint16(from), uint16(from + len(fd.Value)), fd.kind, fd.plain}
	if n < len(r.said.at) {
		r.said.at[n] = l
	} else {
		r.said.at = append(r.said.at, l)
	}
}

// end keeps the lines of b for the next time, all of which were read. Those of a
// head that was refused are not kept, nor others beside them.
func (r *reading) end(b []byte, ok bool) {
	switch {
	case r.said == nil || ok && !r.news && r.n == len(r.said.at):
	case ok && r.keeps:
		r.said.text, r.said.at = append(r.said.text[:0], b...), r.said.at[:r.n]
	default:
		r.said.text, r.said.at = r.said.text[:0], r.said.at[:0]
	}
}
