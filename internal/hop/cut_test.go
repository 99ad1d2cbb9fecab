package hop

import (
	"net"
	"testing"
	"testing/synctest"
)

// A peer that is gone ends its streams as one does that breaks them off.
func TestPeerIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		cut := make(chan struct{})
		far := Accepted(b, Config{}, func(s *Stream) bool {
			s.OnCut(func() {
				s.Close()
				close(cut)
			})
			return true
		})
		near := Dialled(a, Config{})
		ended := make(chan struct{}, 2)
		for _, c := range []*Conn{near, far} {
			go func() {
				_ = c.Run()
				ended <- struct{}{}
			}()
		}
		s, err := near.Open()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		near.Sever()
		<-cut
		<-ended
		<-ended
		s.Close()
	})
}
