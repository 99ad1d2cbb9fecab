package http1

import (
	"net/http"
	"strconv"
)

// states of a decoder, in the order of a chunk
const (
	chunkSize = iota
	chunkExt
	chunkSizeLF
	chunkData
	chunkDataCR
	chunkDataLF
	chunkTrailer
	chunkEndLF
	chunkDone
)

const (
	maxChunkDigits = 15       // sizes stay below 2^60
	maxTrailer     = 8 << 10  // bytes of all trailer lines
	maxChunkExt    = 16 << 10 // bytes of extensions above what the data pays for
)

// decoder reads the chunked coding (RFC 9112 section 7.1) from pieces of any
// size. Extensions are read and dropped. The zero value is ready.
type decoder struct {
	state   uint8
	digits  uint8
	left    int64 // data bytes left in this chunk
	data    int64 // data bytes seen
	ext     int64 // extension bytes seen
	trailer []byte
	scrub   *Scrub  // takes something out of the data; nil: nothing
	last    []Field // of trailer, once it was read
}

// feed consumes b up to the end of the body, appending the data to out: framed
// in chunks of our own when framed is set. n is what was consumed. done tells
// when the body, trailers included, is complete; the closing chunk is for
// appendLast.
func (d *decoder) feed(out, b []byte, framed bool) (_ []byte, n int, err error) {
	for n < len(b) && d.state != chunkDone {
		c := b[n]
		switch d.state {
		case chunkSize:
			err = d.size(c)
		case chunkExt:
			err = d.extension(c)
		case chunkSizeLF:
			if c != '\n' {
				return out, n, refuse(ReasonChunk, "a chunk size line does not end in CRLF")
			}
			d.state, d.digits = chunkData, 0
			if d.left == 0 {
				d.state = chunkTrailer
			}
		case chunkData:
			k := int(min(d.left, int64(len(b)-n)))
			piece := b[n : n+k]
			if d.scrub != nil {
				piece = d.scrub.feed(piece)
			}
			out = appendChunk(out, piece, framed)
			d.left -= int64(k)
			d.data += int64(k)
			if n += k; d.left == 0 {
				d.state = chunkDataCR
			}
			continue
		case chunkDataCR:
			if c != '\r' {
				return out, n, refuse(ReasonChunk, "chunk data is longer than its size says")
			}
			d.state = chunkDataLF
		case chunkDataLF:
			if c != '\n' {
				return out, n, refuse(ReasonChunk, "chunk data does not end in CRLF")
			}
			d.state = chunkSize
		case chunkTrailer:
			err = d.trailerByte(c)
		case chunkEndLF:
			if c != '\n' {
				return out, n, refuse(ReasonTrailer, "the blank line behind a chunked body is not CRLF")
			}
			d.state = chunkDone
		}
		if err != nil {
			return out, n, err
		}
		n++
	}
	return out, n, nil
}

func (d *decoder) done() bool { return d.state == chunkDone }

func (d *decoder) size(c byte) error {
	v := unhex(c)
	switch {
	case v >= 0 && d.digits < maxChunkDigits:
		d.left = d.left<<4 | int64(v)
		d.digits++
	case v >= 0:
		return refuse(ReasonChunk, "a chunk size has more than 15 digits")
	case c == '\r' && d.digits > 0:
		d.state = chunkSizeLF
	case c == ';' && d.digits > 0:
		d.state = chunkExt
	default:
		return refuse(ReasonChunk, "a chunk size is not a hexadecimal number")
	}
	return nil
}

func (d *decoder) extension(c byte) error {
	if c == '\r' {
		d.state = chunkSizeLF
		return nil
	}
	if class[c]&isValue == 0 {
		return refuse(ReasonChunk, "a chunk extension holds a control byte")
	}
	if d.ext++; d.ext > maxChunkExt+d.data {
		return refuse(ReasonChunk, "chunk extensions outweigh the data")
	}
	return nil
}

// trailerByte collects trailer lines up to the blank one.
func (d *decoder) trailerByte(c byte) error {
	n := len(d.trailer)
	if c == '\r' && (n == 0 || d.trailer[n-1] == '\n') {
		d.state = chunkEndLF
		return nil
	}
	if n == maxTrailer {
		return refuseAs(http.StatusRequestHeaderFieldsTooLarge, ReasonTrailer, "trailers are larger than 8 KiB")
	}
	if (c == '\n') != (n > 0 && d.trailer[n-1] == '\r') {
		return refuse(ReasonTrailer, "a trailer line does not end in CRLF")
	}
	d.trailer = append(d.trailer, c)
	return nil
}

// appendLast appends the closing chunk: with the trailers when pass is set.
// Fields that may not stand in trailers (RFC 9110 section 6.5.1), and those in
// dropped, do not pass.
func (d *decoder) appendLast(out []byte, pass bool, dropped *NameSet, lim *Limits) ([]byte, error) {
	out = append(out, "0\r\n"...)
	if d.scrub != nil {
		d.scrub.Clean(d.trailer)
	}
	fields, err := d.fields(lim)
	if err != nil {
		return out, err
	}
	d.last = fields
	for i := range fields {
		if pass && fields[i].kind == kindOther && !protected.Has(fields[i].Name) && !dropped.Has(fields[i].Name) {
			out = appendField(out, fields[i].Name, fields[i].Value)
		}
	}
	return append(out, '\r', '\n'), nil
}

// fields are the trailers. They are looked at where they do not pass, too: a
// body whose end is in doubt says nothing of where the next message begins.
func (d *decoder) fields(lim *Limits) ([]Field, error) {
	if len(d.trailer) == 0 {
		return nil, nil
	}
	var f framing
	return parseFields(nil, d.trailer, lim, &f, nil)
}

// appendChunk appends data, as one chunk when framed.
func appendChunk(out, data []byte, framed bool) []byte {
	if !framed {
		return append(out, data...)
	}
	if len(data) == 0 {
		return out
	}
	out = strconv.AppendInt(out, int64(len(data)), 16)
	out = append(out, '\r', '\n')
	out = append(out, data...)
	return append(out, '\r', '\n')
}
