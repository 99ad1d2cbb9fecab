package http1

import (
	"net/http"
	"strconv"
)

// An Edit says how a head changes on its way. The zero value changes nothing
// but what the protocol demands.
type Edit struct {
	// Drop names the fields that are not passed on, for instance those that
	// only this proxy may set; as trailers of a response neither.
	Drop *NameSet
	// Extra is appended: whole field lines, each ended by CRLF. Their names
	// should be in Drop.
	Extra []byte
	// Also names more of what Drop does, but for trailers.
	Also *NameSet
	// Path replaces the path of a request, without its query. Default: the
	// request's.
	Path []byte
	// Authority replaces the Host of a request. Default: the request's.
	Authority []byte
	// Close announces that the connection ends after this message.
	Close bool
}

// Reserved are the names that tell an application about its caller and
// that only the mesh may set. Every listener drops them from requests.
var Reserved = NewNameSet("sallyport-*", "x-forwarded-*", "forwarded", "x-real-ip", "x-envoy-*")

// forwards says whether a field of this kind passes through as it is.
func (k kind) forwards() bool {
	switch k {
	case kindOther, kindAuthorization, kindContentType, kindTraceparent, kindCookie:
		return true
	}
	return false
}

// AppendRequest appends the head of r as it goes to an upstream: HTTP/1.1,
// origin form with the canonical path, hop-by-hop fields and e.Drop removed,
// framing written anew, e.Extra, and the blank line. e may be nil.
func AppendRequest(dst []byte, r *Request, e *Edit) []byte {
	if e == nil {
		e = &Edit{}
	}
	authority := r.Authority
	if len(e.Authority) > 0 {
		authority = e.Authority
	}
	dst = append(dst, r.Method...)
	dst = append(dst, ' ')
	if r.Form == Authority {
		dst = append(dst, authority...)
	} else {
		if len(e.Path) > 0 {
			dst = append(dst, e.Path...)
		} else {
			dst = append(dst, r.Path...)
		}
		if len(r.RawQuery) > 0 {
			dst = append(dst, '?')
			dst = append(dst, r.RawQuery...)
		}
	}
	dst = append(dst, " HTTP/1.1\r\nHost: "...)
	dst = append(dst, authority...)
	dst = append(dst, '\r', '\n')
	dst = appendFields(dst, r.Fields, e)
	if r.Form != Authority {
		dst = appendFraming(dst, r.Body)
	}
	switch {
	case r.Upgrade:
		dst = append(dst, "Connection: Upgrade\r\nUpgrade: websocket\r\n"...)
	case r.TETrailers && e.Close:
		dst = append(dst, "TE: trailers\r\nConnection: TE, close\r\n"...)
	case r.TETrailers:
		dst = append(dst, "TE: trailers\r\nConnection: TE\r\n"...)
	case e.Close:
		dst = append(dst, closeLine...)
	}
	dst = append(dst, e.Extra...)
	return append(dst, '\r', '\n')
}

const closeLine = "Connection: close\r\n"

// AppendResponse appends the head of r as it goes to the client, with the
// framing that its body will have. For HEAD and 304, body is NoBody and
// Content-Length is passed on. e may be nil.
func AppendResponse(dst []byte, r *Response, body Body, e *Edit) []byte {
	if e == nil {
		e = &Edit{}
	}
	dst = append(dst, "HTTP/1.1 "...)
	dst = strconv.AppendInt(dst, int64(r.Status), 10)
	dst = append(dst, ' ')
	dst = append(dst, r.Phrase...)
	dst = append(dst, '\r', '\n')
	dst = appendFields(dst, r.Fields, e)
	if body.Framing == NoBody && r.ContentLength >= 0 {
		body = Body{Framing: Length, Length: r.ContentLength}
	}
	if body.Framing == Chunked {
		for i := range r.Fields {
			if r.Fields[i].kind == kindTrailer {
				dst = appendField(dst, r.Fields[i].Name, r.Fields[i].Value)
			}
		}
	}
	dst = appendFraming(dst, body)
	switch {
	case r.Upgrade:
		dst = append(dst, "Connection: Upgrade\r\nUpgrade: websocket\r\n"...)
	case e.Close:
		dst = append(dst, closeLine...)
	}
	dst = append(dst, e.Extra...)
	return append(dst, '\r', '\n')
}

func appendFields(dst []byte, fields []Field, e *Edit) []byte {
	for i := range fields {
		fd := &fields[i]
		switch {
		case !fd.kind.forwards() || e.Drop.Has(fd.Name) || e.Also.Has(fd.Name):
		case fd.plain:
			dst = append(dst, fd.Name[:len(fd.Name)+len(fd.Value)+len(": \r\n")]...)
		default:
			dst = appendField(dst, fd.Name, fd.Value)
		}
	}
	return dst
}

func appendField(dst, name, value []byte) []byte {
	dst = append(dst, name...)
	dst = append(dst, ':', ' ')
	dst = append(dst, value...)
	return append(dst, '\r', '\n')
}

func appendFraming(dst []byte, b Body) []byte {
	switch b.Framing {
	case Length:
		dst = append(dst, "Content-Length: "...)
		dst = strconv.AppendInt(dst, b.Length, 10)
		return append(dst, '\r', '\n')
	case Chunked:
		return append(dst, "Transfer-Encoding: chunked\r\n"...)
	}
	return dst
}

// WriteError writes a short answer of the proxy's own with a JSON body. extra
// holds further whole field lines, each ended by CRLF. r is the request that
// is answered, nil when it could not be read. keep says that the connection
// may carry the next request: the body of r was at hand and has been
// discarded. Otherwise the answer said Connection: close and the caller should
// Linger.
func (c *Conn) WriteError(r *Request, status int, extra, body []byte) (keep bool, err error) {
	return c.writeError(r, status, jsonLine, extra, body)
}

// WriteRefusal is WriteError for a client that reads nothing but a head: extra
// says all, its Content-Type too.
func (c *Conn) WriteRefusal(r *Request, status int, extra []byte) (keep bool, err error) {
	return c.writeError(r, status, "", extra, nil)
}

// WriteAnswer is WriteError for an answer that is no error: extra says what its
// body is.
func (c *Conn) WriteAnswer(r *Request, status int, extra, body []byte) (keep bool, err error) {
	return c.writeError(r, status, "", extra, body)
}

const jsonLine = "Content-Type: application/json\r\n"

func (c *Conn) writeError(r *Request, status int, kind string, extra, body []byte) (keep bool, err error) {
	keep = r != nil && r.KeepAlive && c.discard(r)
	b := append(c.message(), "HTTP/1.1 "...)
	b = strconv.AppendInt(b, int64(status), 10)
	b = append(b, ' ')
	b = append(b, http.StatusText(status)...)
	b = append(append(b, "\r\n"...), kind...)
	if status != http.StatusNoContent && status != http.StatusNotModified {
		b = append(b, "Content-Length: "...)
		b = strconv.AppendInt(b, int64(len(body)), 10)
		b = append(b, '\r', '\n')
	}
	if !keep {
		b = append(b, closeLine...)
	}
	b = append(b, extra...)
	b = append(b, '\r', '\n')
	if r == nil || string(r.Method) != "HEAD" {
		b = append(b, body...)
	}
	c.out = b
	if _, err = c.Write(b); err != nil {
		return false, err
	}
	return keep, nil
}

// discard reads past the body of r if all of it has arrived.
func (c *Conn) discard(r *Request) bool {
	if r.started {
		return false
	}
	switch r.Body.Framing {
	case Length:
		if r.Body.Length > int64(c.w-c.r) {
			return false
		}
		c.r += int(r.Body.Length)
	case Chunked:
		var d decoder
		_, n, err := d.feed(c.out[:0], c.buf[c.r:c.w], false)
		if err != nil || !d.done() {
			return false
		}
		if _, err := d.fields(&c.lim); err != nil {
			return false
		}
		c.r += n
	}
	r.started = true
	return true
}
