package test

import "strings"

// targetClasses: what is asked for?
func targetClasses() []strictClass {
	target := func(name, t string) strictCase { return refuse(name, 400, strictTarget(t)...) }
	path := func(name, in, out string) strictCase {
		return pass(name, strictTarget("/v1/strict"+in), "GET /v1/strict"+out+" HTTP/1.1\r\n")
	}
	connect := func(name string, status int, target, more string) strictCase {
		return refuse(name, status, "CONNECT "+target+" HTTP/1.1\r\nHost: "+target+"\r\n"+more+"\r\n")
	}
	long := func(n int) string { return strings.Repeat("a", n) }
	return []strictClass{
		{15, "CONNECT", []strictCase{
			connect("through a service", 405, "evil.test:443", "").at(atIn).kept(), connect("to itself", 405, "billing.mesh.internal:8443", "").at(atIn).kept(),
			connect("to a service of the mesh", 400, "billing.mesh.internal:8443", "").at(atOut).kept(), connect("where no gateway is", 403, "evil.test:443", "").at(atOut).kept(),
			connect("to a path", 400, strictPath, ""), connect("to a URI", 400, "http://billing.mesh.internal:80", ""), connect("without a port", 400, "billing.mesh.internal", ""),
			connect("to port zero", 400, "billing.mesh.internal:0", ""), connect("with a body", 400, "billing.mesh.internal:80", "Content-Length: 1\r\n"),
			refuse("with another Host", 400, "CONNECT a.test:443 HTTP/1.1\r\nHost: b.test:443\r\n\r\n"),
		}},
		{17, "targets of no form", []strictCase{
			target("opaque", "http:admin/x"), target("opaque path", "http:"+strictPath), target("relative", "v1/strict/x"), target("query alone", "?a=b"), target("asterisk", "*"),
			target("empty", ""), target("mail", "mailto:a@b"), target("scheme alone", "http://"), target("no scheme", "//billing.mesh.internal/x\\"), target("script", "javascript:x"),
			refuse("OPTIONS *", 405, "OPTIONS * HTTP/1.1\r\n"+strictHost+"\r\n").at(atIn).kept(),
		}},
		{18, "absolute targets", []strictCase{
			target("another scheme", "ftp://billing.mesh.internal"+strictPath), target("a user", "http://u:p@billing.mesh.internal"+strictPath), target("another host", "http://inventory.mesh.internal"+strictPath),
			target("another port", "http://billing.mesh.internal:81"+strictPath), target("no host", "http://"+strictPath), target("a backslash", "http:\\\\billing.mesh.internal"+strictPath), target("a fragment", "http://billing.mesh.internal"+strictPath+"#x"),
			target("an escaped host", "http://billing%2emesh.internal"+strictPath), target("one slash", "http:/billing.mesh.internal"+strictPath),
			pass("the same host", strictTarget("http://billing.mesh.internal"+strictPath+"?q"), "GET "+strictPath+"?q HTTP/1.1\r\nHost: billing.mesh.internal\r\n"),
			pass("the same host in other case", strictTarget("HTTP://Billing.Mesh.Internal"+strictPath), "GET "+strictPath+" HTTP/1.1\r\nHost: billing.mesh.internal\r\n"),
		}},
		{25, "paths", []strictCase{
			target("parent", "/v1/strict/../secret"), target("escaped parent", "/v1/strict/%2e%2E/secret"), target("half escaped parent", "/v1/strict/.%2e/secret"), target("parent at the end", "/v1/strict/.."),
			target("above the root", "/../../etc/passwd"), target("escaped slash", "/v1/strict%2fx"), target("escaped backslash", "/v1/strict/%5cx"), target("backslash", "/v1/strict\\x"), target("backslash parent", "/v1/strict/..\\x"),
			target("escaped NUL", strictPath+"%00"), target("escaped line end", strictPath+"%0d%0aX:y"), target("escaped DEL", strictPath+"%7f"), target("fragment", strictPath+"#y"), target("escape that is none", strictPath+"%zz"), target("escape cut off", strictPath+"%4"),
			target("parameters", strictPath+";a=b"), target("parameters on a parent", "/v1/strict/..;/secret"), target("other letters", strictPath+"\xc3\xa4"), target("overlong slash", strictPath+"\xc0\xaf"), target("quote", strictPath+"\"x"), target("space", strictPath+" x"), target("control byte", strictPath+"\x01"),
			path("doubled slashes", "//x///y", "/x/y"), path("dots", "/./x/.", "/x/"), path("escaped letters", "/%78", "/x"), path("escapes in lower case", "/x%c3%a4", "/x%C3%A4"), path("escaped twice stays", "/x%252fy", "/x%252fy"),
			path("slash at the end", "/x/", "/x/"), path("case", "/X", "/X"), path("query as it came", "/x?a=%2f..//;%00&b", "/x?a=%2f..//;%00&b"), path("brackets of browsers", "/x[1]|^", "/x%5B1%5D%7C%5E"), path("escaped dot in a name", "/x%2ejson", "/x.json"),
			refuse("what is judged is what is forwarded", 403, strictTarget("/v1/%73ecret//x")...).kept(),
		}},
		{30, "sizes", []strictCase{
			refuse("too many fields", 431, strictGet(strings.Repeat("A: b\r\n", 100))...), refuse("a head too large", 431, strictGet("A: "+long(33<<10)+"\r\n")...),
			refuse("a head without end", 431, "GET "+strictPath+" HTTP/1.1\r\n"+strictHost+"A: "+long(64<<10)), refuse("a name too large", 431, strictGet(long(33<<10)+": b\r\n")...),
			refuse("a target too long", 414, strictTarget("/v1/strict/"+long(8<<10))...), refuse("a target without end", 414, "GET /"+long(64<<10)),
			pass("as many fields as there may be", strictGet(strings.Repeat("A: b\r\n", 90)), "A: b\r\n"), pass("a head almost too large", strictGet("A: "+long(31<<10)+"\r\n"), long(31<<10)),
			pass("a target almost too long", strictTarget("/v1/strict/"+long(8<<10-20)), long(8<<10-20)),
		}},
	}
}

// answerClasses: what may an application say?
func answerClasses() []strictClass {
	ask := strictGet("")
	bad := func(name, answer string) strictCase {
		return strictCase{name: name, say: ask, status: 502, keep: true, reach: whole, answer: answer, fresh: true}
	}
	good := func(name, answer string, fresh bool, tells ...string) strictCase {
		return strictCase{name: name, say: ask, status: 200, keep: true, reach: whole, answer: answer, fresh: fresh, hangUp: fresh && strings.Contains(name, "close"), tells: tells}
	}
	const ok = "HTTP/1.1 200 OK\r\n"
	return []strictClass{
		{27, "answers", []strictCase{
			bad("two lengths", ok+"Content-Length: 2\r\nContent-Length: 2\r\n\r\nok"), bad("two differing lengths", ok+"Content-Length: 2\r\nContent-Length: 40\r\n\r\nok"), bad("list of lengths", ok+"Content-Length: 2, 2\r\n\r\nok"),
			bad("signed length", ok+"Content-Length: +2\r\n\r\nok"), bad("length and coding", ok+"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"), bad("another coding", ok+"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
			bad("coding in HTTP/1.0", "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), bad("204 with a body", "HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nok"), bad("204 with a coding", "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
			bad("103 with a body", "HTTP/1.1 103 Early Hints\r\nContent-Length: 2\r\n\r\nok"), bad("101 unasked", "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"),
			bad("bad name", ok+"A b: c\r\nContent-Length: 2\r\n\r\nok"), bad("space before the colon", ok+"Content-Length : 2\r\n\r\nok"), bad("folded", ok+"A: b\r\n c\r\nContent-Length: 2\r\n\r\nok"), bad("bare LF", "HTTP/1.1 200 OK\nContent-Length: 2\n\nok"),
			bad("NUL", ok+"A: \x00\r\nContent-Length: 2\r\n\r\nok"), bad("bare CR", ok+"A: b\rX: y\r\nContent-Length: 2\r\n\r\nok"), bad("another version", "HTTP/1.2 200 OK\r\nContent-Length: 2\r\n\r\nok"), bad("another protocol", "SSH-2.0-x\r\n\r\n"),
			bad("status of two digits", "HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\nok"), bad("status out of range", "HTTP/1.1 999 OK\r\nContent-Length: 2\r\n\r\nok"), bad("a head too large", ok+"A: "+strings.Repeat("a", 33<<10)+"\r\n\r\n"), bad("too many fields", ok+strings.Repeat("A: b\r\n", 101)+"\r\n"),
			good("a second answer that nobody asked for", ok+"Content-Length: 2\r\n\r\nok"+ok+"Content-Length: 6\r\n\r\npoison", true),
			good("bytes behind the answer", ok+"Content-Length: 2\r\n\r\nokpoison", true),
			{name: "a body behind 304", say: ask, status: 304, keep: true, reach: whole, answer: "HTTP/1.1 304 Not Modified\r\nContent-Length: 6\r\n\r\npoison", fresh: true},
			{name: "a body behind 204", say: ask, status: 204, keep: true, reach: whole, answer: "HTTP/1.1 204 No Content\r\n\r\npoison", fresh: true},
			{name: "decisions that are not ours", say: ask, status: 200, keep: true, reach: whole, answer: ok + "Sallyport-Decision: forged\r\nSALLYPORT_Warning: forged\r\nContent-Length: 2\r\n\r\nok", hides: []string{"forged"}},
		}},
		{29, "answers of every form", []strictCase{
			good("a length", ok+"Content-Length: 2\r\nX: y\r\n\r\nok", false, "X: y\r\n", "ok"), good("chunked with trailers", ok+"Transfer-Encoding: chunked\r\nTrailer: Sum\r\n\r\n2;x\r\nok\r\n0\r\nSum: 7\r\n\r\n", false, "ok", "Sum: 7"),
			good("until the connection closes", ok+"\r\nok", true, "ok"), good("HTTP/1.0 until it closes", "HTTP/1.0 200 OK\r\n\r\nok", true, "ok"), good("which ends its connection", ok+"Connection: close\r\nContent-Length: 2\r\n\r\nok", true, "ok"),
			good("100 unasked", "HTTP/1.1 100 Continue\r\n\r\n"+ok+"Content-Length: 2\r\n\r\nok", false, "ok"), good("103", "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"+ok+"Content-Length: 2\r\n\r\nok", false, "ok"),
			bad("too many of 1xx", strings.Repeat("HTTP/1.1 102 Processing\r\n\r\n", 9)+ok+"Content-Length: 2\r\n\r\nok"),
			{name: "HEAD", say: []string{"HEAD " + strictPath + " HTTP/1.1\r\n" + strictHost + "\r\n"}, status: 200, keep: true, reach: whole, answer: ok + "Content-Length: 7\r\n\r\n", tells: []string{"Content-Length: 7\r\n"}},
			{name: "304", say: ask, status: 304, keep: true, reach: whole, answer: "HTTP/1.1 304 Not Modified\r\nETag: x\r\nContent-Length: 7\r\n\r\n", tells: []string{"Etag: x\r\n"}},
			{name: "204", say: ask, status: 204, keep: true, reach: whole, answer: "HTTP/1.1 204 No Content\r\n\r\n"},
			{name: "a length that is not kept", say: ask, status: 200, reach: whole, answer: ok + "Content-Length: 20\r\n\r\nok", hangUp: true},
			{name: "chunks that break off", say: ask, status: 200, reach: whole, answer: ok + "Transfer-Encoding: chunked\r\n\r\n5\r\nok", hangUp: true},
			{name: "nothing", say: ask, status: 502, keep: true, reach: whole, answer: "H", hangUp: true, fresh: true, twice: true},
		}},
	}
}

// limitClasses are tried where the limits are set in the configuration.
func limitClasses() []strictClass {
	long := func(n int) string { return strings.Repeat("a", n) }
	return []strictClass{
		{30, "sizes that are set", []strictCase{
			refuse("too many fields", 431, strictGet(strings.Repeat("A: b\r\n", 20))...), refuse("a head too large", 431, strictGet("A: "+long(2<<10)+"\r\n")...),
			refuse("a target too long", 414, strictTarget("/v1/strict/"+long(512))...), refuse("an underscore", 400, strictGet("My_Field: x\r\n")...),
			pass("a small head", strictGet(""), "GET"),
		}},
		{31, "slow clients", []strictCase{
			refuse("a head that never ends", 408, "GET "+strictPath+" HTTP/1.1\r\n"+strictHost), refuse("a request line that never ends", 408, "GET /v1"),
			refuse("a body that never comes", 408, strictPost("Content-Length: 2\r\n", "")...), refuse("a body that never ends", 408, strictPost("Content-Length: 2\r\n", "a")...),
			refuse("a chunk that never comes", 408, strictPost(chunkedField, "")...), refuse("a client that waits for 100 and then says nothing", 408, strictPost("Content-Length: 2\r\nExpect: 100-continue\r\n", "")...),
			{name: "a chunk that never ends", say: strictPost(chunkedField, "5\r\nab"), status: 408, reach: cutOff},
			{name: "a connection that says nothing", say: []string{""}, reach: nothing},
		}},
	}
}

// trustClasses are tried where the caller is trusted with X-Forwarded-For, and
// paths may have parameters.
func trustClasses() []strictClass {
	chain := func(name, lines, xff, fors string) strictCase {
		c := pass(name, strictGet(lines), "X-Forwarded-For: "+xff+"\r\n", "Forwarded: "+fors+";host=\"billing.mesh.internal\";proto=https\r\n", "X-Forwarded-Proto: https\r\n")
		c.hides = []string{"forged"}
		return c
	}
	target := func(name, t string) strictCase { return refuse(name, 400, strictTarget(t)...) }
	path := func(name, in, out string) strictCase {
		return pass(name, strictTarget("/v1/strict"+in), "GET /v1/strict"+out+" HTTP/1.1\r\n")
	}
	deny := func(name, t string) strictCase { return refuse(name, 403, strictTarget(t)...).kept() }
	const peer, forPeer = "127.0.0.1", "for=127.0.0.1"
	return []strictClass{
		{23, "through which addresses, of whom is trusted", []strictCase{
			chain("nothing said", "", peer, forPeer),
			chain("one", "X-Forwarded-For: 203.0.113.5\r\n", "203.0.113.5, "+peer, "for=203.0.113.5, "+forPeer),
			chain("several in two lines", "X-Forwarded-For: 203.0.113.5,2001:db8::1\r\nx-forwarded-for: 198.51.100.1:443\r\n", "203.0.113.5, 2001:db8::1, 198.51.100.1, "+peer, "for=203.0.113.5, for=\"[2001:db8::1]\", for=198.51.100.1, "+forPeer),
			chain("behind what is no address", "X-Forwarded-For: 10.0.0.1, forged, 203.0.113.5\r\n", "203.0.113.5, "+peer, "for=203.0.113.5, "+forPeer),
			chain("no address", "X-Forwarded-For: forged\r\n", peer, forPeer),
			chain("all else", "X_Forwarded_For: forged\r\nForwarded: for=forged\r\nX-Forwarded-Proto: forged\r\nX-Forwarded-Host: forged\r\nX-Real-IP: forged\r\nX-Forwarded-Client-Cert: URI=forged\r\n", peer, forPeer),
		}},
		{25, "paths with parameters, where they may be", []strictCase{
			path("as they came", "/x;a=b;c/y;", "/x;a=b;c/y;"), path("made canonical", "//%78;%61=b/./y", "/x;a=b/y"), path("escaped semicolon", "/x%3by", "/x%3By"),
			deny("on what is refused", "/v1/secret;x"), deny("on every segment of it", "/v1;a/secret;b"), pass("on what is allowed", strictTarget("/v1;/strict/x"), "GET /v1;/strict/x HTTP/1.1\r\n"), deny("empty", "/v1/secret;"),
			target("on a parent", "/v1/strict/..;/secret"), target("on an escaped parent", "/v1/strict/%2e%2e;x/secret"), target("on a dot", "/v1/strict/.;/x"),
			target("of no segment", "/v1/strict/;/x"), target("of the root", "/;x"), target("escaped slash in them", "/v1/strict/x;a%2f..%2fsecret"), target("parent behind them", "/v1/strict/x;/../secret"), target("control byte in them", "/v1/strict/x;%00"),
		}},
	}
}
