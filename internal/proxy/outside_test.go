package proxy

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
)

func TestRequestsForTheWorldOutsideGoToAGateway(t *testing.T) {
	r := newRig(t, app(t, hello))
	asked := make(chan *http.Request, 4)
	fakeGateway(t, r, func(c net.Conn, br *bufio.Reader, req *http.Request) {
		for err := error(nil); err == nil; req, err = http.ReadRequest(br) {
			body, _ := io.ReadAll(req.Body)
			asked <- req
			if req.URL.Path == "/no" {
				fmt.Fprint(c, "HTTP/1.1 403 Forbidden\r\nSallyport-Decision: abc-1\r\nContent-Length: 2\r\n\r\n{}")
				continue
			}
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		}
	})
	w := r.dial()
	const head = "Host: shop.test:8080\r\nX-Mine: yes\r\nEgress-Origin: vip\r\nProxy-Authorization: Basic c2VjcmV0\r\nX-Forwarded-For: 1.2.3.4\r\n"
	for range 2 { // the connection to the gateway is used again
		w.say("POST http://shop.test:8080/v1?x=1 HTTP/1.1\r\n" + head + "Content-Length: 5\r\n\r\nhello")
		if resp, body := w.answer("POST"); resp.StatusCode != 200 || body != "hello" {
			t.Fatalf("%d %q", resp.StatusCode, body)
		}
		req := <-asked
		if req.Method != "POST" || req.Host != "shop.test:8080" || req.RequestURI != "/v1?x=1" || req.Header.Get("Egress-Origin") != "explicit" ||
			len(req.Header.Values("Egress-Origin")) != 1 || req.Header.Get("X-Mine") != "yes" || req.Header.Get("Proxy-Authorization") != "" || req.Header.Get("X-Forwarded-For") != "" {
			t.Errorf("the gateway was asked %s %s for %s: %v", req.Method, req.RequestURI, req.Host, req.Header)
		}
	}
	w.say("GET http://shop.test:8080/no HTTP/1.1\r\n" + head + "\r\n")
	if resp, _ := w.answer("GET"); resp.StatusCode != 403 || resp.Header.Get("Sallyport-Decision") != "abc-1" {
		t.Errorf("refused with %d %v", resp.StatusCode, resp.Header)
	}
	<-asked
	w.say("GET https://shop.test/ HTTP/1.1\r\nHost: shop.test\r\n\r\n")
	if resp, _ := w.answer("GET"); resp.StatusCode != 403 || len(asked) > 0 {
		t.Errorf("https: %d", resp.StatusCode)
	}
}

func TestRequestsWithoutAGatewayThatAnswers(t *testing.T) {
	r := newRig(t, app(t, hello))
	useGateway(r, "127.0.0.1:1")
	resp, body := get(t, r.client(), "http://shop.test/v1")
	if resp.StatusCode != 502 || !strings.Contains(body, "gateway") {
		t.Errorf("%d %s", resp.StatusCode, body)
	}
}
