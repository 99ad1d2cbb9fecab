package http1

import (
	"bytes"
	"net/http"
)

// A Response is one parsed response head. Its slices are views that hold
// until the next ReadResponse on the same Conn; reading the body keeps them.
type Response struct {
	// Status is 100 to 599.
	Status int
	// Phrase is the reason phrase as received; may be empty.
	Phrase []byte
	Body   Body
	// ContentLength is what the field said, -1 without it. For HEAD and 304
	// it describes a body that is not sent.
	ContentLength int64
	Minor         int
	// KeepAlive says that the upstream keeps the connection open.
	KeepAlive bool
	// Upgrade says that this is a 101 to websocket.
	Upgrade bool
	Fields  []Field
}

// Get finds the first field of this name, in any case; nil when absent.
func (r *Response) Get(name string) []byte { return get(r.Fields, name) }

// Informational says that another response follows.
func (r *Response) Informational() bool {
	return r.Status < 200 && r.Status != http.StatusSwitchingProtocols
}

// ReadResponse reads the next response head, interim ones too, to a request
// with this method. Errors are as for ReadRequest; a *ProtocolError has status
// 502. How long to wait is Limits.ResponseTimeout.
func (c *Conn) ReadResponse(r *Response, method string) error {
	c.readWithin(c.lim.ResponseTimeout)
	return c.readResponse(r, method)
}

func (c *Conn) readResponse(r *Response, method string) error {
	*r = Response{Fields: r.Fields[:0]}
	c.restRead()
	h, err := c.head(false)
	if err == nil {
		c.trailers = true
		err = r.parse(h, &c.lim, method, &c.said)
	}
	if pe, ok := err.(*ProtocolError); ok {
		pe.Status = http.StatusBadGateway
	}
	return err
}

func (r *Response) parse(h []byte, lim *Limits, method string, said *lines) error {
	end := bytes.IndexByte(h, '\n')
	if end < 1 || h[end-1] != '\r' {
		return refuse(ReasonLineEnding, "the status line does not end in CRLF")
	}
	if err := r.line(h[:end-1]); err != nil {
		return err
	}
	var f framing
	var err error
	if r.Fields, err = parseFields(r.Fields, h[end+1:], lim, &f, said); err != nil {
		return err
	}
	r.ContentLength = f.length
	return r.framing(&f, method)
}

// line reads version, status and phrase (RFC 9112 section 4). A phrase may be
// left out together with the space before it.
func (r *Response) line(b []byte) error {
	if len(b) < 12 || string(b[:7]) != "HTTP/1." || b[8] != ' ' || len(b) > 12 && b[12] != ' ' {
		return refuse(ReasonStartLine, "the status line is not version, status and phrase")
	}
	switch b[7] {
	case '0', '1':
		r.Minor = int(b[7] - '0')
	default:
		return refuse(ReasonVersion, "the version is neither HTTP/1.1 nor HTTP/1.0")
	}
	if !digit(b[9]) || !digit(b[10]) || !digit(b[11]) || b[9] < '1' || b[9] > '5' {
		return refuse(ReasonStatus, "the status is not a number from 100 to 599")
	}
	r.Status = int(b[9]-'0')*100 + int(b[10]-'0')*10 + int(b[11]-'0')
	if len(b) > 13 {
		r.Phrase = b[13:]
	}
	if !validValue(r.Phrase) {
		return refuse(ReasonStartLine, "the reason phrase holds a control byte")
	}
	return nil
}

// framing settles the body (RFC 9112 section 6.3).
func (r *Response) framing(f *framing, method string) error {
	if f.chunked && r.Minor == 0 {
		return refuse(ReasonFraming, "Transfer-Encoding does not exist in HTTP/1.0")
	}
	r.KeepAlive = r.Minor == 1 && !f.close
	switch {
	case r.Status < 200 || r.Status == http.StatusNoContent:
		if f.chunked || f.length > 0 {
			return refuse(ReasonFraming, "a response of this status has no body, yet its head announces one")
		}
		r.ContentLength = -1
		return r.switching(f)
	case method == "CONNECT" && r.Status < 300:
		r.ContentLength = -1 // RFC 9110 section 9.3.6: framing fields are ignored
	case method == "HEAD" || r.Status == http.StatusNotModified:
	case f.chunked:
		r.Body = Body{Framing: Chunked}
	case f.length >= 0:
		r.Body = Body{Framing: Length, Length: f.length}
	default:
		r.Body = Body{Framing: UntilClose}
		r.KeepAlive = false
	}
	return nil
}

// switching checks a 101; whether it was asked for is for the exchange.
func (r *Response) switching(f *framing) error {
	if r.Status != http.StatusSwitchingProtocols {
		return nil
	}
	r.Upgrade = f.upgrade && equalFoldLen(get(r.Fields, "upgrade"), "websocket")
	if !r.Upgrade {
		return refuse(ReasonUpgrade, "101 without an upgrade to websocket")
	}
	return nil
}
