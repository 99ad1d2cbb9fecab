//go:build !linux

package http1

type peeker struct{}

// Stale says that a pooled connection must not be used. Here only bytes that
// were read already are known; a connection that the peer closed is found out
// when it is used.
func (c *Conn) Stale() bool {
	s, ok := c.nc.(interface{ Stale() bool })
	return c.w > c.r || ok && s.Stale()
}
