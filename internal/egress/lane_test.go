package egress

import (
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

// TestLanesOutliveTheirDeadline has a stream of net/http stand while nobody writes,
// and end while somebody does, once the time is over.
func TestLanesOutliveTheirDeadline(t *testing.T) {
	failed := make(chan error, 1)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := &lane2{stream2: &stream2{w: w, r: r.Body, rc: http.NewResponseController(w)}}
		defer c.finish()
		soon := time.Now().Add(20 * time.Millisecond)
		_ = c.SetWriteDeadline(soon)
		<-time.After(2 * time.Until(soon))
		_ = c.SetWriteDeadline(time.Now().Add(time.Minute))
		if _, err := c.Write([]byte("late")); err != nil {
			failed <- err
			return
		}
		_ = c.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
		for { // until the client, which reads no more, has no room
			if _, err := c.Write(make([]byte, 1<<20)); err != nil {
				failed <- nil
				return
			}
		}
	}))
	srv.EnableHTTP2 = true
	srv.StartTLS()
	defer srv.Close()
	res, err := srv.Client().Get(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if b, err := io.ReadAll(io.LimitReader(res.Body, 4)); err != nil || string(b) != "late" {
		t.Errorf("%q came: %v", b, err)
	}
	if err := <-failed; err != nil {
		t.Error(err)
	}
}
