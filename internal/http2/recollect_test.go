package http2

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

// A head gives the same section whatever was made before it.
func TestRecollectionIsExact(t *testing.T) {
	rnd := rand.New(rand.NewPCG(7, 541))
	pool := []string{
		"User-Agent: a\r\n", "User-Agent: ab\r\n", "user-agent:   a\r\n", "Accept: */*\r\n", "Content-Length: 5\r\n", "Content-Length: 0\r\n",
		"Transfer-Encoding: chunked\r\n", "Connection: close\r\n", "Upgrade: websocket\r\n", "Upgrade: other\r\n", "X: \r\n", "X: y\r\n", "Cookie: a=b\r\n",
		"X-Long: " + strings.Repeat("z", 1500) + "\r\n",
	}
	var known recollection
	for n := range 2000 {
		var head bytes.Buffer
		for range rnd.IntN(8) {
			head.WriteString(pool[rnd.IntN(len(pool))])
		}
		switch {
		case n%7 == 0:
			head.WriteString("no field\r\n")
		case n%11 == 0:
			head.Reset()
			fmt.Fprintf(&head, "X-%d: y\r\n", n)
		}
		text := append(head.Bytes(), "\r\nbody: 1\r\n\r\n"...)
		var fresh recollection
		var got, want string
		for _, r := range []*recollection{&known, &fresh} {
			r.begin()
			if n%3 == 0 { // where the fields begin is not always the same
				r.block = appendStatus(r.block, 200+n%5)
			}
			k, said, err := r.fields(text)
			got, want = want, fmt.Sprintf("%d %+v %v %x", k, said, err, r.block)
			if err != nil {
				got, want = "", "" // nobody looks at the rest
			}
		}
		if got != want {
			t.Fatalf("%q: %s, want %s", text, got, want)
		}
	}
}

// Heads that are like the last one cost no allocation, and large ones are not kept.
func TestRecollectionHoldsLittle(t *testing.T) {
	var r recollection
	text := []byte("User-Agent: a\r\nAccept: */*\r\nX-Request-Id: 1234\r\nContent-Length: 10\r\n\r\n")
	encode := func() {
		r.begin()
		text[43] ^= 1
		if _, said, err := r.fields(text); err != nil || said.length != 11 {
			t.Fatal(said, err)
		}
	}
	for range 3 {
		encode()
	}
	if n := testing.AllocsPerRun(100, encode); n > 0 {
		t.Errorf("%v allocations", n)
	}
	r.begin()
	if _, _, err := r.fields([]byte("X: " + strings.Repeat("x", 3*maxRecalled) + "\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	if len(r.lines) > 0 || cap(r.text) > maxRecalled {
		t.Errorf("%d lines and %d bytes are kept", len(r.lines), cap(r.text))
	}
	for range 2 {
		encode()
	}
	if n := cap(r.block) + cap(r.was); n > 2*maxRecalled {
		t.Errorf("sections hold %d bytes", n)
	}
}
