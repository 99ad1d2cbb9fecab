package http2

import (
	"bytes"
	"net/http"
	"strconv"
)

func appendNumber(b []byte, n int64) []byte {
	return append(strconv.AppendInt(b, n, 10), "\r\n"...)
}

// Turned is the status that the client of the last answer was told, if it is
// another one than was written. It is for who writes.
func (l *Lane) Turned() int { return l.out.turned }

// answer makes the field section of an answer of its head in HTTP/1.1, and says
// how long that is.
func (o *outgoing) answer(p []byte) (n int, body framing, err error) {
	end := bytes.IndexByte(p, '\n')
	if end < 14 || string(p[:7]) != "HTTP/1." {
		return 0, 0, errUnclear
	}
	status := 0
	for _, c := range p[9:12] {
		if c < '0' || c > '9' {
			return 0, 0, errUnclear
		}
		status = 10*status + int(c-'0')
	}
	tunnel := status == 101 && o.asked == askedWebSocket
	switch {
	case tunnel:
		status = 200
	case status < 100 || status == 101 || status > 599:
		return 0, 0, errUnclear
	case status/100 == 2 && o.asked == askedWebSocket:
		// An application that knows no WebSocket may answer as if it had been
		// asked for a page. Here that would open one (RFC 8441 section 5).
		status = http.StatusBadGateway
		o.turned = status
	}
	o.heads.begin()
	o.heads.block = appendStatus(o.heads.block, status)
	n, said, err := o.heads.fields(p[end+1:])
	if err != nil {
		return 0, 0, err
	}
	n += end + 1
	o.block = o.heads.block
	switch {
	case tunnel, o.asked == askedConnect && status/100 == 2:
		return n, bodyTunnel, nil
	case status < 200:
		return n, bodyLater, nil
	case o.head, status == 204, status == 304, !said.chunks && said.length <= 1:
		return n, bodyNone, nil
	case said.chunks:
		return n, bodyChunks, nil
	}
	o.left = said.length - 1
	return n, bodyLength, nil
}
