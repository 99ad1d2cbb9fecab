package http2

import (
	"bytes"
	"net/http"
	"strconv"
)

func appendNumber(b []byte, n int64) []byte {
	return append(strconv.AppendInt(b, n, 10), "\r\n"...)
}

// answer makes the field section of an answer of its head in HTTP/1.1.
func (o *outgoing) answer(head []byte) (framing, error) {
	end := bytes.IndexByte(head, '\n')
	if end < 14 || string(head[:7]) != "HTTP/1." {
		return 0, errUnclear
	}
	status, err := strconv.Atoi(string(head[9:12]))
	if err != nil || status < 100 || status > 599 {
		return 0, errUnclear
	}
	lines := head[end+1:]
	switch {
	case status == 101 && o.asked == askedWebSocket:
		o.block = appendStatus(o.block[:0], 200)
		_, _, err := o.fields(lines)
		return bodyTunnel, err
	case status == 101:
		return 0, errUnclear
	case status/100 == 2 && o.asked == askedWebSocket:
		// An application that knows no WebSocket may answer as if it had been
		// asked for a page. Here that would open one (RFC 8441 section 5).
		status = http.StatusBadGateway
	}
	o.block = appendStatus(o.block[:0], status)
	chunks, length, err := o.fields(lines)
	switch {
	case err != nil:
		return 0, err
	case status < 200:
		return bodyLater, nil
	case o.asked == askedConnect && status < 300:
		return bodyTunnel, nil
	case o.head, status == 204, status == 304, !chunks && length <= 0:
		return bodyNone, nil
	case chunks:
		return bodyChunks, nil
	}
	o.left = length
	return bodyLength, nil
}
