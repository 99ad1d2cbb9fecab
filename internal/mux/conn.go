package mux

import (
	"crypto/tls"
	"net"
)

// StateOf is that of the TLS connection that nc is; the zero one of any other.
func StateOf(nc net.Conn) tls.ConnectionState {
	if t, ok := nc.(interface{ ConnectionState() tls.ConnectionState }); ok {
		return t.ConnectionState()
	}
	return tls.ConnectionState{}
}

// Sever closes nc without last words to the peer.
func Sever(nc net.Conn) {
	if n, ok := nc.(interface{ NetConn() net.Conn }); ok {
		nc = n.NetConn()
	}
	nc.Close()
}
