package http1

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

const chunkedPost = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"

func chunkOf(n int) string { return fmt.Sprintf("%x\r\n%s\r\n", n, strings.Repeat("x", n)) }

// TestChunkedRate sends a body of unknown length at one pace after another. What
// was sent in good time does not help later, and framing is not data.
func TestChunkedRate(t *testing.T) {
	for _, c := range []struct {
		name   string
		rate   int
		begin  int           // bytes at once
		chunk  string        // then again and again
		every  time.Duration // 0: never again
		status int
		within time.Duration
	}{
		{"a drop now and then", 100, 10, chunkOf(1), time.Second, 408, 15 * time.Second},
		{"after a good beginning", 100, 1 << 20, chunkOf(1), time.Second, 408, 25 * time.Second},
		{"in large chunks that dribble", 100, 10, "f\r\nxxxxxxxxxxxxxxx\r\n", 3 * time.Second, 408, 15 * time.Second},
		{"extensions without data", 100, 10, "1;" + strings.Repeat("e", 300) + "\r\nx\r\n", time.Second, 408, 15 * time.Second},
		{"silence", 100, 10, "", 0, 408, 25 * time.Second},
		{"just fast enough", 100, 10, chunkOf(110), time.Second, 200, 2 * time.Minute},
		{"in bursts", 100, 10, chunkOf(1000), 9 * time.Second, 200, 5 * time.Minute},
		{"slow, no rate set", 0, 10, chunkOf(1), 20 * time.Second, 200, 10 * time.Minute},
	} {
		synctest.Test(t, func(t *testing.T) {
			var wg sync.WaitGroup
			defer wg.Wait()
			client, upstream, outcome := pipesWithin(Limits{ChunkedRate: c.rate}, time.Minute)
			wg.Go(func() {
				req, err := http.ReadRequest(bufio.NewReader(upstream))
				if err != nil {
					return
				}
				if _, err := io.Copy(io.Discard, req.Body); err == nil {
					_, _ = io.WriteString(upstream, okAnswer)
				}
			})
			start := time.Now()
			wg.Go(func() {
				_, _ = io.WriteString(client, chunkedPost+chunkOf(c.begin))
				for range 30 {
					if c.every == 0 {
						return
					}
					<-time.After(c.every)
					if _, err := io.WriteString(client, c.chunk); err != nil {
						return
					}
				}
				_, _ = io.WriteString(client, "0\r\n\r\n")
			})
			resp, err := http.ReadResponse(bufio.NewReader(client), nil)
			if err != nil || resp.StatusCode != c.status {
				t.Fatalf("%s: %v, %v", c.name, resp, err)
			}
			if d := time.Since(start); d > c.within {
				t.Errorf("%s: took %v", c.name, d)
			}
			client.Close()
			upstream.Close()
			if err := <-outcome; (c.status == 200) != (err == nil) || err != nil && (!errors.Is(err, ErrSlowBody) || FailedSide(err) != Client) {
				t.Errorf("%s: outcome %v", c.name, err)
			}
		})
	}
}

// TestChunkedRateOfASlowApplication has a client that would send as fast as it
// may.
func TestChunkedRateOfASlowApplication(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var wg sync.WaitGroup
		defer wg.Wait()
		client, upstream, outcome := pipesWithin(Limits{ChunkedRate: 10_000}, time.Minute)
		wg.Go(func() {
			br := bufio.NewReaderSize(upstream, 16)
			req, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			for b := make([]byte, 512); err == nil; _, err = req.Body.Read(b) {
				<-time.After(100 * time.Millisecond)
			}
			_, _ = io.WriteString(upstream, okAnswer)
		})
		wg.Go(func() {
			_, _ = io.WriteString(client, chunkedPost+strings.Repeat(chunkOf(100), 200)+"0\r\n\r\n")
		})
		resp, err := http.ReadResponse(bufio.NewReader(client), nil)
		if err != nil || resp.StatusCode != 200 {
			t.Fatalf("%v, %v", resp, err)
		}
		client.Close()
		upstream.Close()
		if err := <-outcome; err != nil {
			t.Errorf("outcome %v", err)
		}
	})
}

// TestChunkedRateOfWhoReads has clients that take an answer of unknown length.
func TestChunkedRateOfWhoReads(t *testing.T) {
	const chunked, untilClose = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "HTTP/1.0 200 OK\r\n\r\n"
	for _, c := range []struct {
		name, head string
		rate       int
		rest       time.Duration // of the application between two pieces
		read       int           // bytes that the client takes every second
		cut        bool
	}{
		{"chunked, slowly", chunked, 100, 0, 10, true},
		{"until the end, slowly", untilClose, 100, 0, 10, true},
		{"fast enough", chunked, 100, 0, 1000, false},
		{"slowly, no rate set", chunked, 0, 0, 10, false},
		{"the application is slow", chunked, 100, 30 * time.Second, 1000, false},
	} {
		synctest.Test(t, func(t *testing.T) {
			var wg sync.WaitGroup
			defer wg.Wait()
			client, upstream, outcome := pipesWithin(Limits{ChunkedRate: c.rate}, time.Minute)
			wg.Go(func() {
				if _, err := http.ReadRequest(bufio.NewReader(upstream)); err != nil {
					return
				}
				_, _ = io.WriteString(upstream, c.head)
				for range 30 {
					<-time.After(c.rest)
					piece := strings.Repeat("y", 300)
					if c.head == chunked {
						piece = chunkOf(300)
					}
					if _, err := io.WriteString(upstream, piece); err != nil {
						return
					}
				}
				if c.head == chunked {
					_, _ = io.WriteString(upstream, "0\r\n\r\n")
				}
				upstream.Close()
			})
			_, _ = io.WriteString(client, plainGet)
			got, ended := 0, false
			start := time.Now()
			for b := make([]byte, c.read); !ended; {
				n, err := client.Read(b)
				got += n
				if ended = err != nil || strings.HasSuffix(string(b[:n]), "0\r\n\r\n"); !ended {
					<-time.After(time.Second)
				}
			}
			client.Close()
			err := <-outcome
			if c.cut && (!errors.Is(err, ErrSlowBody) || FailedSide(err) != Client || time.Since(start) > time.Minute) {
				t.Errorf("%s: after %v and %d bytes: %v", c.name, time.Since(start), got, err)
			}
			if !c.cut && (err != nil || got < 30*300) {
				t.Errorf("%s: after %v and %d bytes: %v", c.name, time.Since(start), got, err)
			}
		})
	}
}
