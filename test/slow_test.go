package test

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"sallyport/internal/meshtest"
)

// TestChunkedRate dribbles bodies of unknown length to the listeners of real
// sidecars: no single byte is late, and by limits.chunked_rate each is too slow.
// The deadlines are minutes away.
func TestChunkedRate(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "curl")
	s := newStrictRig(t, "limits: {chunked_rate: 100, body_timeout: 5m, write_timeout: 5m}\n")
	const drop = 200 * time.Millisecond
	// dribble sends a chunk of one byte after another until something comes back,
	// and returns how many it sent.
	dribble := func(c net.Conn, most int) (sent int, answer *http.Response, err error) {
		if _, err := io.WriteString(c, strictPost(chunkedField, "")[0]); err != nil {
			t.Fatal(err)
		}
		came := make(chan error, 1)
		go func() {
			var err error
			answer, err = http.ReadResponse(bufio.NewReader(c), nil)
			came <- err
		}()
		tick := time.NewTicker(drop)
		defer tick.Stop()
		for ; sent < most; sent++ {
			select {
			case err := <-came:
				return sent, answer, err
			case <-tick.C:
				if _, err := io.WriteString(c, "1\r\nx\r\n"); err != nil {
					err = errors.Join(err, <-came) // answer is not read before
					return sent, answer, err
				}
			}
		}
		if _, err := io.WriteString(c, "0\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		err = <-came
		return sent, answer, err
	}
	t.Run("a caller that dribbles is told 408", func(t *testing.T) {
		t.Parallel()
		c := s.connect(t)
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(3 * within))
		sent, answer, err := dribble(c, 100_000)
		if err != nil || answer.StatusCode != http.StatusRequestTimeout || !answer.Close {
			t.Fatalf("after %d drops: %+v, %v", sent, answer, err)
		}
		t.Logf("refused after %d drops", sent)
	})
	t.Run("a workload that dribbles is told 408", func(t *testing.T) {
		t.Parallel()
		r, err := try[runReply](s.payment, "/run", []string{"sh", "-c",
			"while printf x; do sleep 0.2; done | curl -s -m 25 -o /dev/null -w '%{http_code}' -X POST -T . http://billing.mesh.internal" + strictPath})
		if err != nil || !strings.HasSuffix(r.Output, "408") {
			t.Errorf("curl ended with %d and says %s (%v)", r.Code, r.Output, err)
		}
	})
	t.Run("without a rate it is served", func(t *testing.T) {
		t.Parallel()
		s := newStrictRig(t, "")
		c := s.connect(t)
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(3 * within))
		sent, answer, err := dribble(c, 75) // longer than the rate is counted for
		if err != nil || answer.StatusCode != http.StatusOK {
			t.Errorf("after %d drops: %+v, %v", sent, answer, err)
		}
	})
}

// TestChunkedRateOfWhoReads takes an answer of unknown length at a third of the
// rate, and never pauses for long: it ends early, and can be seen to.
func TestChunkedRateOfWhoReads(t *testing.T) {
	t.Parallel()
	s := newStrictRig(t, "limits: {chunked_rate: 1048576, body_timeout: 5m, write_timeout: 5m}\n")
	const pieces, piece = 1024, 64 << 10 // far more than all buffers on the way hold
	s.app.expect(strictCase{answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("10000\r\n"+strings.Repeat("x", piece)+"\r\n", pieces) + "0\r\n\r\n"})
	c := s.connect(t)
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(8 * within))
	if _, err := io.WriteString(c, strictGet("")[0]); err != nil {
		t.Fatal(err)
	}
	answer, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || answer.StatusCode != http.StatusOK {
		t.Fatal(answer, err)
	}
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	n, taken := int64(0), int64(0)
	for ; err == nil; <-tick.C {
		taken, err = io.CopyN(io.Discard, answer.Body, piece)
		n += taken
	}
	if errors.Is(err, io.EOF) || n >= pieces*piece {
		t.Errorf("all %d bytes came, %v", n, err)
	}
	t.Logf("cut off after %d bytes: %v", n, err)
}
